{{- define "oneloop.name" -}}
{{- .Release.Name | trunc 53 | trimSuffix "-" -}}
{{- end }}

{{- define "oneloop.selector" -}}
app.kubernetes.io/name: oneloop
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "oneloop.labels" -}}
{{ include "oneloop.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end }}
