// What `helm template` does with a chart's own templates, by the engine and the functions that Helm is made of.
// render CHART < {"release", "namespace", "values"} > the documents
package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"log"
	"os"
	"path/filepath"
	"strings"
	"text/template"

	"github.com/Masterminds/sprig"
	"gopkg.in/yaml.v3"
)

type given struct {
	Release, Namespace string
	Values             map[string]interface{}
}

func main() {
	log.SetFlags(0)
	chart, input := os.Args[1], given{}
	check(json.NewDecoder(os.Stdin).Decode(&input))
	about := map[string]interface{}{}
	text, err := os.ReadFile(filepath.Join(chart, "Chart.yaml"))
	check(err)
	check(yaml.Unmarshal(text, &about))

	all := template.New("chart").Option("missingkey=error")
	functions := sprig.TxtFuncMap()
	functions["include"] = func(name string, data interface{}) (string, error) {
		var out bytes.Buffer
		err := all.ExecuteTemplate(&out, name, data)
		return out.String(), err
	}
	functions["toYaml"] = func(value interface{}) (string, error) {
		out, err := yaml.Marshal(value)
		return strings.TrimSuffix(string(out), "\n"), err
	}
	functions["required"] = func(why string, value interface{}) (interface{}, error) {
		if value == nil || value == "" {
			return nil, fmt.Errorf("%s", why)
		}
		return value, nil
	}
	all.Funcs(functions)

	files, err := filepath.Glob(filepath.Join(chart, "templates", "*"))
	check(err)
	for _, file := range files {
		text, err := os.ReadFile(file)
		check(err)
		template.Must(all.New(filepath.Base(file)).Parse(string(text)))
	}
	data := map[string]interface{}{
		"Values":  input.Values,
		"Release": map[string]interface{}{"Name": input.Release, "Namespace": input.Namespace, "Service": "Helm"},
		"Chart":   map[string]interface{}{"Name": about["name"], "AppVersion": about["appVersion"]},
	}
	for _, file := range files {
		if strings.HasSuffix(file, ".tpl") {
			continue
		}
		fmt.Printf("---\n# %s\n", filepath.Base(file))
		check(all.ExecuteTemplate(os.Stdout, filepath.Base(file), data))
	}
}

func check(err error) {
	if err != nil {
		log.Fatal(err)
	}
}
