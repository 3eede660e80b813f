// The sampling settings: what is left empty is not sent, so the model's own values hold.
import { el, find } from "./dom.js";
import { load, save } from "./store.js";

const NUMBER = /^-?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?$/i;

const FIELDS = [
  { name: "temperature", label: "Temperature", hint: "0 to 2; 0 is greedy", read: decimal },
  { name: "top_p", label: "Top p", hint: "above 0, up to 1", read: decimal },
  { name: "max_tokens", label: "Max tokens", hint: "", read: whole },
  { name: "seed", label: "Seed", hint: "same seed, same text", read: whole },
  { name: "presence_penalty", label: "Presence penalty", hint: "−2 to 2", read: decimal },
  { name: "frequency_penalty", label: "Frequency penalty", hint: "−2 to 2", read: decimal },
  { name: "repetition_penalty", label: "Repetition penalty", hint: "1 changes nothing", read: decimal },
  { name: "stop", label: "Stop", hint: "one text a line, at most 4; \\n is a line break", read: stops, lines: 2 },
];
const OTHERS = ["system", "response_format", "schema"];

/** Values that cannot be sent; `setting` is its name. */
export class Mistake extends Error {
  constructor(setting, message) {
    super(message);
    this.setting = setting;
  }
}

/** Return the sampling parameters of a request out of texts by name. Throws Mistake. */
export function sampling(texts) {
  const found = {};
  for (const { name, label, read } of FIELDS) {
    const text = texts[name] ?? "";
    if (text.trim() !== "") found[name] = read(name, label, text);
  }
  if (texts.response_format === "json_object") found.response_format = { type: "json_object" };
  if (texts.response_format === "json_schema") found.response_format = schemaFormat(texts.schema ?? "");
  return found;
}

function decimal(name, label, text) {
  if (!NUMBER.test(text.trim())) throw new Mistake(name, `${label}: “${text.trim()}” is not a number.`);
  return Number(text);
}

function whole(name, label, text) {
  const value = decimal(name, label, text);
  if (!Number.isSafeInteger(value)) throw new Mistake(name, `${label}: “${text.trim()}” is not a whole number below 2⁵³.`);
  return value;
}

function stops(name, label, text) {
  return text.split("\n").filter((line) => line !== "").map((line) => {
    const unknown = line.match(/\\(?![nt\\])./);
    if (unknown) throw new Mistake(name, `${label}: write \\\\ for a backslash (given: ${unknown[0]}).`);
    return line.replace(/\\(.)/g, (_, letter) => ({ n: "\n", t: "\t" })[letter] ?? letter);
  });
}

function schemaFormat(text) {
  let schema;
  try {
    schema = JSON.parse(text);
  } catch (error) {
    throw new Mistake("schema", `JSON schema: ${text.trim() ? error.message : "it is empty"}.`);
  }
  return { type: "json_schema", json_schema: { name: "answer", schema } };
}

/** Put the fields on the page, with what was kept, and keep what changes. */
export function connectSettings() {
  find("sampling").append(...FIELDS.map(row));
  const kept = load("settings", {});
  for (const input of inputs()) {
    input.value = typeof kept[input.name] === "string" ? kept[input.name] : input.tagName === "SELECT" ? "text" : "";
    input.addEventListener("input", () => {
      complain(null);
      save("settings", texts());
      showSchema();
    });
  }
  find("settings-reset").addEventListener("click", () => {
    for (const input of inputs()) input.value = input.tagName === "SELECT" ? "text" : "";
    complain(null);
    save("settings", texts());
    showSchema();
  });
  showSchema();
}

function row({ name, label, hint, lines }) {
  const more = { id: `set-${name}`, name, autocomplete: "off", spellcheck: "false", "aria-describedby": `hint-${name}` };
  const input = lines ? el("textarea", { ...more, rows: lines }) : el("input", { ...more, inputmode: "decimal" });
  return el("div", { class: lines ? "setting wide" : "setting" },
    el("label", { for: `set-${name}`, text: label }), input,
    el("p", { class: "hint", id: `hint-${name}`, text: hint }));
}

/** Say what holds in a mode where `max_tokens` is left empty, and hide what has no place there. */
export function fitSettings(mode) {
  find("hint-max_tokens").textContent = mode === "chat" ? "empty: what fits" : "empty: 16";
  find("system-row").hidden = mode !== "chat";
}

const inputs = () => [...FIELDS.map(({ name }) => name), ...OTHERS].map((name) => find(`set-${name}`));

const texts = () => Object.fromEntries(inputs().map((input) => [input.name, input.value]));

function showSchema() {
  find("schema-row").hidden = find("set-response_format").value !== "json_schema";
}

/** Return the system prompt and the sampling parameters; null, with the field shown, where one cannot be sent. */
export function current() {
  try {
    const given = { system: find("set-system").value, sampling: sampling(texts()) };
    complain(null);
    return given;
  } catch (mistake) {
    if (!(mistake instanceof Mistake)) throw mistake;
    complain(mistake);
    return null;
  }
}

function complain(mistake) {
  for (const input of inputs()) input.removeAttribute("aria-invalid");
  find("settings-mistake").textContent = mistake?.message ?? "";
  if (!mistake) return;
  find("settings").open = true;
  find(`set-${mistake.setting}`).setAttribute("aria-invalid", "true");
  find(`set-${mistake.setting}`).focus();
}
