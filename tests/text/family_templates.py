"""Templates that behave as those of real families do, in few lines of our own: what they refuse, lose and read.

Only the behaviour is theirs: which messages raise, which fields are read and how, what is printed where.
"""

# Calls stand only where content is none; arguments and type are concatenated; of several systems the last one
# wins; what
# stands before </think> in a past answer is cut; the answer begins inside of the reasoning.
DEEPSEEK_R1 = """{%- set ns = namespace(system='', in_results=false) %}
{%- for m in messages if m.role == 'system' %}{% set ns.system = m.content %}{% endfor %}
{{- bos_token + ns.system }}
{%- for m in messages %}
{%- if m.role == 'user' %}{% set ns.in_results = false %}{{ '<|User|>' + m.content }}{% endif %}
{%- if m.role == 'assistant' and m.content is none %}
{%- for call in m.tool_calls %}
{{- '<|Assistant|><|calls|>' if loop.first else '\\n' }}
{{- '<|call|>' + call.type + '<|sep|>' + call.function.name + '\\n```json\\n' + call.function.arguments
+ '\\n```<|end|>' }}
{%- endfor %}{{ '<|calls end|>' + eos_token }}
{%- endif %}
{%- if m.role == 'assistant' and m.content is not none %}
{{- '' if ns.in_results else '<|Assistant|>' }}{% set ns.in_results = false %}
{{- m.content.split('</think>')[-1] + eos_token }}
{%- endif %}
{%- if m.role == 'tool' %}{% set ns.in_results = true %}{{ '<|out|>' + m.content + '<|out end|>' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt and not ns.in_results %}{{ '<|Assistant|><think>\\n' }}{% endif %}
"""

# Content is added to the calls unless it is none; all systems are joined at the start; `thinking` opens or closes.
DEEPSEEK_V31 = """{%- set ns = namespace(system='') %}
{%- for m in messages if m.role == 'system' %}
{%- set ns.system = ns.system + ('\\n\\n' if ns.system else '') + m.content %}{% endfor %}
{{- bos_token + ns.system }}
{%- for m in messages %}
{%- if m.role == 'user' %}{{ '<|User|>' + m.content }}
{%- elif m.role == 'assistant' and m.tool_calls is defined and m.tool_calls is not none %}
{{- '<|Assistant|></think>' if messages[loop.index0 - 1].role == 'user' }}
{%- for call in m.tool_calls %}
{%- if loop.first and m.content is not none %}{{ m.content }}{% endif %}
{{- '<|call|>' + call.function.name + '<|sep|>' + call.function.arguments + '<|end|>' }}{% endfor %}{{ eos_token }}
{%- elif m.role == 'assistant' %}
{{- '<|Assistant|></think>' if messages[loop.index0 - 1].role == 'user' }}
{{- m.content.split('</think>', 1)[-1] + eos_token }}
{%- elif m.role == 'tool' %}{{ '<|out|>' + m.content + '<|out end|>' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|Assistant|>' + ('<think>' if thinking else '</think>') }}{% endif %}
"""

# A block of reasoning stands in each answer behind the last user; </think> in the content is taken apart.
QWEN3 = """{%- set ns = namespace(last=0) %}
{%- for m in messages if m.role == 'user' %}{% set ns.last = messages.index(m) %}{% endfor %}
{%- if tools %}{{ '<|im_start|>system\\n' }}
{%- if messages[0].role == 'system' %}{{ messages[0].content + '\\n\\n' }}{% endif %}
{%- for tool in tools %}{{ tool | tojson + '\\n' }}{% endfor %}{{ '<|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}{{ '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- for m in messages %}
{%- set content = m.content if m.content is string else '' %}
{%- if m.role == 'user' or (m.role == 'system' and not loop.first) %}
{{- '<|im_start|>' + m.role + '\\n' + content + '<|im_end|>\\n' }}
{%- elif m.role == 'assistant' %}
{%- set reasoning = '' %}
{%- if m.reasoning_content is string %}{% set reasoning = m.reasoning_content %}
{%- elif '</think>' in content %}
{%- set reasoning = content.split('</think>')[0].split('<think>')[-1] %}
{%- set content = content.split('</think>')[-1].lstrip('\\n') %}{% endif %}
{{- '<|im_start|>assistant\\n' }}
{%- if loop.index0 > ns.last and (loop.last or reasoning) %}
{{- '<think>\\n' + reasoning.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
{%- else %}{{ content }}{% endif %}
{%- for call in m.tool_calls or [] %}
{%- if call.function %}{% set call = call.function %}{% endif %}
{{- '\\n<tool_call>\\n{"name": "' + call.name + '", "arguments": ' }}
{{- call.arguments if call.arguments is string else call.arguments | tojson }}{{ '}\\n</tool_call>' }}
{%- endfor %}{{ '<|im_end|>\\n' }}
{%- elif m.role == 'tool' %}
{{- '<|im_start|>user\\n<tool_response>\\n' + content + '\\n</tool_response><|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}
{%- if enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}{% endif %}
"""

# One system message, first; a user there must be; arguments are walked through; the answer begins inside.
QWEN35 = """{%- macro show(content) %}{% if content is string %}{{ content }}
{%- elif content is iterable and content is not
mapping %}{% for part in content %}{{ part.text }}{% endfor %}{% elif content is none or content is undefined %}
{%- else
%}{{ raise_exception('Unexpected content type.') }}{% endif %}{% endmacro %}
{%- if not messages | selectattr('role', 'equalto', 'user') | list %}{{ raise_exception('No user asks.') }}{% endif %}
{%- for m in messages %}
{%- if m.role == 'system' %}
{%- if not loop.first %}{{ raise_exception('System message must be at the beginning.') }}{% endif %}
{{- '<|im_start|>system\\n' + show(m.content) + '<|im_end|>\\n' }}
{%- elif m.role == 'user' %}{{ '<|im_start|>user\\n' + show(m.content) + '<|im_end|>\\n' }}
{%- elif m.role == 'assistant' %}
{{- '<|im_start|>assistant\\n' }}
{%- if m.reasoning_content is string %}{{ '<think>\\n' + m.reasoning_content + '\\n</think>\\n\\n' }}{% endif %}
{{- show(m.content) }}
{%- for call in m.tool_calls or [] %}{{ '<tool_call>\\n<function=' + call.function.name + '>\\n' }}
{%- for key, value in call.function.arguments | items %}
{{- '<parameter=' + key + '>\\n' + (value if value is string else value | tojson) + '\\n</parameter>\\n' }}
{%- endfor %}{{ '</function>\\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\\n' }}
{%- elif m.role == 'tool' %}
{{- '<|im_start|>user\\n<tool_response>' + show(m.content) + '</tool_response><|im_end|>\\n' }}
{%- else %}{{ raise_exception('Unexpected message role.') }}{% endif %}
{%- endfor %}
{%- if tools %}{{ tools | tojson }}{% endif %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>\\n' }}{% endif %}
"""

# No system, strict turns, nothing of tools.
GEMMA2 = """{{- bos_token }}
{%- if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{%- for m in messages %}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Conversation roles must alternate') }}
{%- endif %}
{{- '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' + m.content | trim
+ '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}
"""

# A leading system is the first user's prefix; strict turns; parts are read and trimmed.
GEMMA3 = """{{- bos_token }}{% set first = '' %}{% set turns = messages %}
{%- if messages[0].role == 'system' %}
{%- set first = (messages[0].content if messages[0].content is string else messages[0].content[0].text) + '\\n\\n' %}
{%- set turns = messages[1:] %}{% endif %}
{%- for m in turns %}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Conversation roles must alternate') }}
{%- endif %}
{{- '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' + (first if loop.first else '') }}
{%- if m.content is string %}{{ m.content | trim }}
{%- elif m.content is iterable %}{% for part in m.content %}{{ part.text | trim }}{% endfor %}
{%- else %}{{ raise_exception('Invalid content type') }}{% endif %}{{ '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}
"""

# Strict turns, but for calls and results; ids of nine; text beside calls is not shown; answers must not be empty.
MISTRAL_V3 = """{%- set turns = messages %}
{%- if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set turns = messages[1:] %}{% endif %}
{%- set ns = namespace(index=0) %}
{%- for m in turns if m.role in ('user', 'system') or (m.role == 'assistant' and not m.tool_calls is defined) %}
{%- if (m.role == 'user') != (ns.index % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}
{%- set ns.index = ns.index + 1 %}{% endfor %}
{{- bos_token }}
{%- for m in turns %}
{%- if m.role == 'user' %}
{%- if tools and m == (turns | selectattr('role', 'equalto', 'user') | list)[-1] %}
{{- '[AVAILABLE_TOOLS]' + tools | tojson + '[/AVAILABLE_TOOLS]' }}{% endif %}
{{- '[INST]' + (system + '\\n\\n' if system is defined and loop.last else '') + m.content + '[/INST]' }}
{%- elif m.tool_calls is defined %}{{ '[TOOL_CALLS][' }}
{%- for call in m.tool_calls %}
{%- if call.id | length != 9 %}{{ raise_exception('ids must have length 9') }}{% endif %}
{{- (call.function | tojson)[:-1] + ', "id": "' + call.id + '"}' }}{{ ', ' if not loop.last }}{% endfor %}
{{- ']' + eos_token }}
{%- elif m.role == 'assistant' %}
{%- if not m.content %}{{ raise_exception('an answer must have content or calls') }}{% endif %}
{{- ' ' + m.content | trim + eos_token }}
{%- elif m.role == 'tool' %}
{%- if m.tool_call_id | length != 9 %}{{ raise_exception('ids must have length 9') }}{% endif %}
{{- '[TOOL_RESULTS]{"content": ' + m.content | string + ', "call_id": "' + m.tool_call_id + '"}[/TOOL_RESULTS]' }}
{%- endif %}
{%- endfor %}
"""

# Text, then calls by name and arguments; systems anywhere; reasoning as a part of the content.
MISTRAL_V11 = """{{- bos_token }}
{%- for m in messages %}
{%- if m.role == 'system' %}{{ '[SYSTEM_PROMPT]' + m.content + '[/SYSTEM_PROMPT]' }}
{%- elif m.role == 'user' %}
{%- if tools %}{{ '[AVAILABLE_TOOLS]' + tools | tojson + '[/AVAILABLE_TOOLS]' }}{% endif %}
{{- '[INST]' + m.content + '[/INST]' }}
{%- elif m.role == 'assistant' %}
{%- if m.content is string %}{{ m.content }}
{%- else %}{% for part in m.content or [] %}
{{- '[THINK]' + part.thinking + '[/THINK]' if part.type == 'thinking' else part.text }}{% endfor %}{% endif %}
{%- for call in m.tool_calls or [] %}
{%- set arguments = call.function.arguments %}
{{- '[TOOL_CALLS]' + call.function.name + '[ARGS]' }}
{{- arguments if arguments is string else arguments | tojson }}{% endfor %}{{ eos_token }}
{%- elif m.role == 'tool' %}{{ '[TOOL_RESULTS]' + m.content | string + '[/TOOL_RESULTS]' }}
{%- else %}{{ raise_exception('unknown role') }}{% endif %}
{%- endfor %}
"""

# One call a turn, and no text beside it; a string is "iterable" and is quoted.
LLAMA31 = """{{- bos_token }}{% set turns = messages %}{% set system = '' %}
{%- if messages[0].role == 'system' %}{% set system = messages[0].content | trim %}{% set turns = messages[1:] %}
{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\n' + system + '<|eot_id|>' }}
{%- if tools is not none %}
{%- if turns | length == 0 %}{{ raise_exception('no first user message to put tools in') }}{% endif %}
{%- set first = turns[0].content | trim %}{% set turns = turns[1:] %}
{{- '<|start_header_id|>user<|end_header_id|>\\n\\n' + tools | tojson + '\\n\\n' + first + '<|eot_id|>' }}{% endif %}
{%- for m in turns %}
{%- if not (m.role == 'tool' or 'tool_calls' in m) %}
{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' + m.content | trim + '<|eot_id|>' }}
{%- elif 'tool_calls' in m %}
{%- if m.tool_calls | length != 1 %}{{ raise_exception('only single tool-calls at once') }}{% endif %}
{%- set call = m.tool_calls[0].function %}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n{"name": "' + call.name + '", "parameters": ' }}
{{- call.arguments | tojson + '}<|eot_id|>' }}
{%- else %}{{ '<|start_header_id|>ipython<|end_header_id|>\\n\\n' }}
{{- m.content | tojson if m.content is iterable else m.content }}{{ '<|eot_id|>' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}
"""

# Arguments by items(); an empty block of reasoning in every answer.
GLM = """[gMASK]<sop>
{%- macro show(content) %}{% if content is string %}{{ content }}{% elif content %}
{%- for part in content %}{{ part.text }}{% endfor %}{% endif %}{% endmacro %}
{%- if tools %}{{ '<|system|>\\n' }}{% for tool in tools %}{{ tool | tojson }}{% endfor %}{% endif %}
{%- for m in messages %}
{%- if m.role == 'user' %}{{ '<|user|>\\n' + show(m.content) }}
{%- elif m.role == 'system' %}{{ '<|system|>\\n' + show(m.content) }}
{%- elif m.role == 'assistant' %}{{ '<|assistant|>' }}
{%- if m.reasoning_content is string %}{{ '\\n<think>' + m.reasoning_content.strip() + '</think>' }}
{%- else %}{{ '\\n<think></think>' }}{% endif %}
{%- if show(m.content).strip() %}{{ '\\n' + show(m.content).split('</think>')[-1].strip() }}{% endif %}
{%- for call in m.tool_calls or [] %}{% if call.function %}{% set call = call.function %}{% endif %}
{{- '\\n<tool_call>' + call.name + '\\n' }}
{%- for key, value in call.arguments.items() %}
{{- '<arg_key>' + key + '</arg_key>\\n<arg_value>' + (value if value is string else value | tojson)
+ '</arg_value>\\n' }}
{%- endfor %}{{ '</tool_call>' }}{% endfor %}
{%- elif m.role == 'tool' %}{{ '<|observation|>\\n<tool_response>\\n' + show(m.content) + '\\n</tool_response>' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' + ('\\n<think></think>' if enable_thinking is false else '') }}
{%- endif %}
"""

# Text or thinking beside calls, not both; descriptions, and defaults of an enum, are concatenated; a result needs its
# call; content always.
GPT_OSS = """{%- macro type_of(schema, required) %}
{%- if schema.type == 'array' %}
{%- if schema['items'] %}{% set inner = schema['items'] %}
{%- if inner.type in ('string', 'boolean') %}{{ inner.type + '[]' }}
{%- elif inner.type in ('number', 'integer') %}{{ 'number[]' }}
{%- else %}{% set text = type_of(inner, required) %}{{ 'any[]' if text | length > 50 else text + '[]' }}{% endif %}
{%- else %}{{ 'any[]' }}{% endif %}
{%- elif schema.type is defined and schema.type is not string and schema.type is iterable %}
{{- schema.type | join(' | ') }}
{%- elif schema.oneOf %}{% for option in schema.oneOf %}{{ type_of(option, required) }}
{%- if option.description %}{{ '// ' + option.description }}{% endif %}{{ ' | ' if not loop.last }}{% endfor %}
{%- elif schema.type == 'string' %}{{ '"' + schema.enum | join('" | "') + '"' if schema.enum else 'string' }}
{%- elif schema.type in ('number', 'integer') %}{{ 'number' }}
{%- elif schema.type == 'boolean' %}{{ 'boolean' }}
{%- elif schema.type == 'object' %}
{%- if schema.properties %}{{ '{ ' }}{% for name, inner in schema.properties.items() %}
{{- name + ('' if name in (schema.required or []) else '?') + ': ' + type_of(inner, schema.required or []) }}
{{- ', ' if not loop.last }}{% endfor %}{{ ' }' }}{% else %}{{ 'object' }}{% endif %}
{%- else %}{{ 'any' }}{% endif %}
{%- endmacro %}
{%- set ns = namespace(call=none) %}
{%- if messages[0].role in ('developer', 'system') %}{% set lead = messages[0].content %}
{%- set turns = messages[1:] %}
{%- else %}{% set lead = '' %}{% set turns = messages %}{% endif %}
{{- '<|start|>system<|message|>Reasoning: low<|end|>' }}
{%- if lead or tools %}{{ '<|start|>developer<|message|>' + lead }}
{%- for tool in tools or [] %}{% set tool = tool.function %}
{{- '// ' + tool.description + '\\ntype ' + tool.name + ' = (' }}
{%- if tool.parameters and tool.parameters.properties %}{{ '_: {\\n' }}
{%- for name, schema in tool.parameters.properties.items() %}
{%- if schema.description %}{{ '// ' + schema.description + '\\n' }}{% endif %}
{{- name + ('' if name in (tool.parameters.required or []) else '?') + ': ' }}
{{- type_of(schema, tool.parameters.required or []) }}
{%- if schema.default is defined %}
{%- if schema.enum or schema.oneOf %}{{ ', // default: ' + schema.default }}
{%- else %}{{ ', // default: ' + schema.default | tojson }}{% endif %}{% endif %}{{ ',\\n' }}
{%- endfor %}{{ '}' }}{% endif %}
{{- ')\\n' }}
{%- endfor %}{{ '<|end|>' }}{% endif %}
{%- for m in turns %}
{%- if m.role == 'assistant' and 'tool_calls' in m %}
{%- if m.content and m.thinking %}{{ raise_exception('Put the analysis in one or the other') }}{% endif %}
{%- if m.content or m.thinking %}
{{- '<|start|>assistant<|channel|>analysis<|message|>' + (m.content or m.thinking) + '<|end|>' }}{% endif %}
{%- if m.tool_calls | length > 1 %}{{ raise_exception('one call at a time') }}{% endif %}
{%- set ns.call = m.tool_calls[0].function.name %}
{{- '<|start|>assistant to=functions.' + ns.call + '<|channel|>commentary json<|message|>' }}
{{- m.tool_calls[0].function.arguments | tojson + '<|call|>' }}
{%- elif m.role == 'assistant' %}{% set ns.call = none %}
{%- if loop.last and not add_generation_prompt and 'thinking' in m %}
{{- '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}{% endif %}
{{- '<|start|>assistant<|channel|>final<|message|>' + m.content + '<|end|>' }}
{%- elif m.role == 'tool' %}
{%- if ns.call is none %}{{ raise_exception('a result without a call') }}{% endif %}
{{- '<|start|>functions.' + ns.call + ' to=assistant<|channel|>commentary<|message|>' + m.content | tojson
+ '<|end|>' }}
{%- elif m.role == 'user' %}{{ '<|start|>user<|message|>' + m.content + '<|end|>' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}
"""

# Tools are text in the system message; nothing of calls.
PHI4_MINI = """{%- for m in messages %}
{%- if m.role == 'system' and 'tools' in m and m.tools is not none %}
{{- '<|system|>' + m.content + '<|tool|>' + m.tools + '<|/tool|><|end|>' }}
{%- else %}{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}
"""

# Results need the name of their tool; a type must be there to be upper-cased; developer is a role.
FUNCTION_GEMMA = """{%- macro show(value) %}
{%- if value is string %}<escape>{{ value }}<escape>{% elif value is boolean
%}{{ 'true' if value else 'false' }}{% elif value is mapping %}{% raw %}{{% endraw %}{% for k, v in value | dictsort
%}{{ k }}:{{ show(v) }}{{ ',' if not loop.last }}{% endfor %}}{% elif value is sequence %}[{% for v in value
%}{{ show(v) }}{{ ',' if not loop.last }}{% endfor %}]{% else %}{{ value }}{% endif %}{% endmacro %}
{{- bos_token }}{% set turns = messages %}
{%- if tools or messages[0].role in ('system', 'developer') %}{{ '<start_of_turn>developer\\n' }}
{%- if messages[0].role in ('system', 'developer') %}{{ messages[0].content }}{% set turns = messages[1:] %}
{%- endif %}
{%- for tool in tools or [] %}
{{- '<declaration>' + tool.function.name + show(tool.function.description) }}
{%- for name, schema in (tool.function.parameters or {}).properties | dictsort %}
{{- name + ':' + (schema.type if schema.type is string else schema.type[0]) | upper + ',' }}{% endfor %}{{ '<end>' }}
{%- endfor %}{{ '<end_of_turn>\\n' }}{% endif %}
{%- for m in turns %}
{%- if m.role == 'tool' %}
{%- if 'name' not in m %}{{ raise_exception('name must be provided') }}{% endif %}
{{- '<response>' + m.name + '{value:' + show(m.content) + '}<end>' }}
{%- else %}
{{- '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' }}
{%- if m.content is string %}{{ m.content | trim }}
{%- elif m.content %}{% for part in m.content %}{{ part.text | trim }}{% endfor %}{% endif %}
{%- for call in m.tool_calls or [] %}{{ '<call>' + call.function.name + show(call.function.arguments) + '<end>' }}
{%- endfor %}{{ '<end_of_turn>\\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}
"""

# The id of a call is all that tells its name.
KIMI = """{%- if tools %}{{ '<|im_system|>tools ' + tools | tojson + '<|im_end|>' }}{% endif %}
{%- for m in messages %}
{%- if m.role == 'tool' %}{{ '<|im_tool|>## Return of ' + m.tool_call_id + '\\n' + m.content + '<|im_end|>' }}
{%- else %}{{ '<|im_' + m.role + '|>' }}
{%- if m.content is string %}{{ m.content }}{% elif m.content %}{% for part in m.content %}{{ part.text }}
{%- endfor %}{% endif %}
{%- for call in m.tool_calls or [] %}{% set arguments = call.function.arguments %}
{{- '<|call|>' + call.id + '<|args|>' + (arguments if arguments is string else arguments | tojson) + '<|end|>' }}
{%- endfor %}{{ '<|im_end|>' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_assistant|>' }}{% endif %}
"""

# What every server starts from: a role and a content.
CHATML = """{%- for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""

# Content is read as parts alone; without tools the variable must not be there at all; declarations are flat.
PARTS_ALONE = """{%- for tool in tools if tools is defined %}{{ '<tool>' + tool.name + tool.parameters | tojson }}
{%- endfor %}
{%- for m in messages %}{{ '<' + m.role + '>' }}
{%- for part in m.content | selectattr('type', 'equalto', 'text') %}{{ part['text'] }}{% endfor %}
{%- for call in m.tool_calls or [] %}{{ '<call>' + call.name + call.arguments | tojson }}{% endfor %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<assistant>' }}{% endif %}
"""

ALL = {name.lower(): text for name, text in dict(globals()).items() if name.isupper() and isinstance(text, str)}
