// The panel of settings: controls are built from what the server says it takes (web/api/config).

import { askForKey, key, setKey } from "./api.js";
import { $, h, toast } from "./dom.js";

const KEPT = "oneloop.settings";
const WORDS = {
  max_completion_tokens: "Most tokens", top_p: "Top p", top_k: "Top k", min_p: "Min p", stop: "Stop strings (one a line)",
  skip_special_tokens: "Skip special tokens", ignore_eos: "Ignore the end token",
};
const EXAMPLE_TOOL = `[{"type": "function", "function": {"name": "get_weather",
  "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}}]`;
const EXAMPLE_SCHEMA = `{"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}`;

let config = null;
let values = { system: "", tools: "", schema: "", logprobs: false, sampling: {}, model: "" };
const fields = new Map();

const words = (name) => WORDS[name] ?? name[0].toUpperCase() + name.slice(1).replaceAll("_", " ");
const keep = () => localStorage.setItem(KEPT, JSON.stringify(values));

function readKept() {
  try {
    const kept = JSON.parse(localStorage.getItem(KEPT) ?? "{}");
    for (const name of ["system", "tools", "schema", "model"]) if (typeof kept[name] === "string") values[name] = kept[name];
    if (kept.sampling !== null && typeof kept.sampling === "object") values.sampling = { ...kept.sampling };
    values.logprobs = kept.logprobs === true;
  } catch {
    // Another program's, or another time's.
  }
}

function limits(schema) {
  const low = schema.minimum ?? schema.exclusiveMinimum;
  if (low === undefined || Math.abs(low) > 1e6) return "";
  const more = schema.exclusiveMinimum === undefined ? "" : "above ";
  return schema.maximum === undefined || schema.maximum > 1e6 ? `from ${more}${low}` : `${more}${low} to ${schema.maximum}`;
}

/** The control of one field, empty where the server's own default is wanted. */
function control({ name, schema, default: preset }) {
  const id = `set-${name}`;
  const standard = preset === null || preset === undefined ? "default" : `default ${preset}`;
  const given = values.sampling[name];
  let field;
  let read;
  if (schema.enum || schema.type === "boolean") {
    const options = schema.enum ?? [true, false];
    field = h("select", { id }, h("option", { value: "", text: standard }),
      ...options.map((option) => h("option", { value: JSON.stringify(option), text: option === true ? "yes" : option === false ? "no" : option })));
    if (options.includes(given)) field.value = JSON.stringify(given);
    read = () => (field.value ? JSON.parse(field.value) : undefined);
  } else if (schema.type === "number" || schema.type === "integer") {
    field = h("input", { id, inputmode: "decimal", placeholder: standard, autocomplete: "off" });
    if (typeof given === "number") field.value = given;
    read = () => {
      const text = field.value.trim();
      const value = Number(text);
      if (text === "") return undefined;
      const fits = Number.isFinite(value) && (schema.type === "number" || Number.isSafeInteger(value))
        && value >= (schema.minimum ?? -Infinity) && value > (schema.exclusiveMinimum ?? -Infinity)
        && value <= (schema.maximum ?? Infinity);
      return fits ? value : null;
    };
  } else {
    field = h("textarea", { id, rows: 2, placeholder: standard });
    if (Array.isArray(given)) field.value = given.join("\n");
    read = () => {
      const lines = field.value.split("\n").filter(Boolean);
      return lines.length ? lines : undefined;
    };
  }
  const hint = limits(schema);
  field.addEventListener("input", () => {
    const value = read();
    field.setAttribute("aria-invalid", String(value === null));
    if (value === undefined || value === null) delete values.sampling[name];
    else values.sampling[name] = value;
    keep();
  });
  fields.set(name, read);
  return h("div", { class: "field", title: schema.description },
    h("label", { for: id }, words(name), hint && h("span", { class: "muted small", text: ` ${hint}` })), field);
}

/** A text of JSON that is checked as it is typed. */
function jsonField(name, label, example, check, disabledBecause) {
  const id = `set-${name}`;
  const problem = h("p", { class: "problem small", id: `${id}-problem`, role: "alert", hidden: true });
  const area = h("textarea", { id, class: "code", rows: 6, spellcheck: "false", placeholder: example, "aria-describedby": `${id}-problem` });
  area.value = values[name];
  const look = () => {
    problem.textContent = area.value.trim() ? check(area.value) : "";
    problem.hidden = !problem.textContent;
    area.setAttribute("aria-invalid", String(!problem.hidden));
  };
  area.addEventListener("input", () => {
    values[name] = area.value;
    look();
    keep();
  });
  look();
  return h("div", { class: "field" }, h("label", { for: id, text: label }), area, problem,
    disabledBecause && h("p", { class: "muted small", text: disabledBecause }));
}

function parsed(text) {
  try {
    return [JSON.parse(text), ""];
  } catch (error) {
    return [undefined, `This is not JSON: ${error.message}`];
  }
}

const checkTools = (text) => {
  const [tools, problem] = parsed(text);
  if (problem) return problem;
  return Array.isArray(tools) && tools.every((tool) => tool?.function?.name) ? "" : 'A list of {"type": "function", "function": {"name": ...}}.';
};
const checkSchema = (text) => {
  const [schema, problem] = parsed(text);
  if (problem) return problem;
  return schema !== null && typeof schema === "object" && !Array.isArray(schema) ? "" : "A JSON schema is an object.";
};

function keyField() {
  const state = h("span", { class: "muted small" });
  const tell = () => (state.textContent = key() ? "A key is set." : "No key is set.");
  tell();
  return h("div", { class: "field" }, h("span", { class: "label", text: "API key" }),
    h("div", { class: "row" },
      h("button", { type: "button", class: "plain", text: "Set a key", onclick: async () => (await askForKey(""), tell()) }),
      h("button", { type: "button", class: "plain", text: "Forget it", onclick: () => (setKey("", false), tell()) }), state));
}

function themeField() {
  const field = h("select", { id: "set-theme" },
    ...[["", "as the system"], ["light", "light"], ["dark", "dark"]].map(([value, text]) => h("option", { value, text })));
  field.value = localStorage.getItem("oneloop.theme") ?? "";
  field.addEventListener("change", () => {
    localStorage.setItem("oneloop.theme", field.value);
    if (field.value) document.documentElement.dataset.theme = field.value;
    else delete document.documentElement.dataset.theme;
  });
  return h("div", { class: "field" }, h("label", { for: "set-theme", text: "Colours" }), field);
}

const part = (title, open, ...content) => h("details", { open }, h("summary", {}, h("h3", { text: title })), ...content);

/** Build the panel. Call once the server's config is there. */
export function build(given) {
  config = given;
  readKept();
  const system = h("textarea", { id: "set-system", rows: 4, placeholder: "None" });
  system.value = values.system;
  system.addEventListener("input", () => ((values.system = system.value), keep()));
  const logprobs = h("input", { type: "checkbox", id: "set-logprobs" });
  logprobs.checked = values.logprobs;
  logprobs.addEventListener("change", () => ((values.logprobs = logprobs.checked), keep()));
  if (!config.models.includes(values.model)) values.model = config.models[0];
  const model = h("select", { id: "set-model" }, ...config.models.map((name) => h("option", { value: name, text: name })));
  model.value = values.model;
  model.addEventListener("change", () => ((values.model = model.value), keep()));
  const reset = h("button", {
    type: "button", class: "plain", text: "Back to defaults", onclick: () => {
      values.sampling = {};
      keep();
      build(config);
      toast("Sampling is as the server has it.");
    },
  });
  $("#settings-body").replaceChildren(
    h("div", { class: "field" }, h("label", { for: "set-model", text: "Model" }), model,
      h("p", { class: "muted small", text: `Context of ${config.max_model_len.toLocaleString("en")} tokens` })),
    h("div", { class: "field" }, h("label", { for: "set-system", text: "System prompt" }), system),
    part("Sampling", true, h("div", { class: "grid" }, ...config.controls.map(control)), reset),
    part("Tools and structure", Boolean(values.tools.trim() || values.schema.trim()),
      jsonField("tools", "Tools (JSON)", EXAMPLE_TOOL, checkTools,
        config.tools ? "" : "How this model writes calls is not known; calls will show as text."),
      jsonField("schema", "Answer by a JSON schema", EXAMPLE_SCHEMA, checkSchema)),
    part("This page", false,
      h("div", { class: "field" }, h("label", { class: "row", for: "set-logprobs" }, logprobs, "Log-probabilities of every token")),
      keyField(), themeField()));
}

/** What an answer is asked with. Throws an Error that says which field is wrong. */
export function current() {
  const sampling = {};
  for (const [name, read] of fields) {
    const value = read();
    if (value === null) throw new Error(`${words(name)}: this value is not possible.`);
    if (value !== undefined) sampling[name] = value;
  }
  const structure = {};
  if (values.tools.trim()) {
    if (checkTools(values.tools)) throw new Error(`Tools: ${checkTools(values.tools)}`);
    structure.tools = JSON.parse(values.tools);
  }
  if (values.schema.trim()) {
    if (checkSchema(values.schema)) throw new Error(`JSON schema: ${checkSchema(values.schema)}`);
    structure.response_format = { type: "json_schema", json_schema: { name: "answer", schema: JSON.parse(values.schema) } };
  }
  return { ...values, sampling, structure };
}
