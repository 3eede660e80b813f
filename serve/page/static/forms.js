// Forms for models that answer at once, made from their metadata: a file, texts, the fields of a table's row, or JSON.
import { call, parse } from "./api.js";
import { duration } from "./ask.js";
import { command, showCommand } from "./curl.js";
import { button, copyButton, el, find, grow, say } from "./dom.js";
import { card } from "./errors.js";
import { table } from "./results.js";
import { body, fields, skeleton } from "./tensors.js";

let shown = null;
const LONG = new Set(["text", "texts", "numbers"]);
const HOW = { texts: "one a line", numbers: "as many as there are, with spaces or commas between" };

/** Show the form of a model. */
export async function showForm(model) {
  const mine = (shown = { model, files: {}, running: null });
  find("task-form").replaceChildren();
  find("task-answer").replaceChildren();
  try {
    const metadata = await (await call(`v2/models/${encodeURIComponent(model)}`)).json();
    if (shown === mine) build(metadata);
  } catch (failure) {
    if (shown === mine) find("task-answer").replaceChildren(card(failure, [["Try again", () => showForm(model)]]));
  }
}

export const stopForm = () => shown?.running?.abort();

function build({ inputs }) {
  shown.inputs = inputs;
  shown.fields = fields(inputs);
  const given = shown.fields ? shown.fields.map(control) : [rawControl(inputs)];
  const grid = el("div", { class: "fields" }, ...given);
  find("task-form").replaceChildren(grid,
    el("p", { class: "send-row" },
      el("button", { type: "submit", class: "main", id: "predict", text: "Predict" }),
      button("As curl", curl, { id: "curl-task" })));
  for (const area of grid.querySelectorAll("textarea")) grow(area)();
}

function control(field) {
  const id = `in-${field.name}`;
  if (field.kind === "file") return fileControl(field, id);
  if (field.columns > 1) {
    const cells = Array.from({ length: field.columns }, (_, at) =>
      el("div", { class: "cell" }, el("label", { for: `${id}-${at}`, text: String(at) }), entry(field, `${id}-${at}`)));
    return el("fieldset", { class: "wide" }, el("legend", {}, field.name, " ", about(field)), el("div", { class: "cells" }, ...cells));
  }
  const wide = LONG.has(field.kind) ? "field wide" : "field";
  return el("div", { class: wide }, el("label", { for: id }, field.name, " ", about(field)), entry(field, id));
}

function entry({ kind, name }, id) {
  const common = { id, dataset: { input: name }, autocomplete: "off" };
  if (LONG.has(kind)) return el("textarea", { ...common, rows: 4, onkeydown: sendByKeys });
  if (kind === "flag") return el("select", common, el("option", { text: "false" }), el("option", { text: "true" }));
  return el("input", { ...common, inputmode: "decimal", spellcheck: "false" });
}

function about({ datatype, shape, kind, parameters }) {
  const sizes = shape.slice(1);
  const told = kind === "file" && sizes.length ? `read as ${sizes.join(" × ")}, ${datatype}` : datatype === "BYTES" ? "text" : datatype;
  const most = parameters.max_tokens ? `, the first ${parameters.max_tokens} tokens are read` : "";
  const how = HOW[kind] ? `, ${HOW[kind]}` : "";
  return el("small", { text: told + how + most + (parameters.optional ? "; may be left empty" : "") });
}

function rawControl(inputs) {
  const field = el("textarea", { id: "raw", class: "code", rows: 8, spellcheck: "false", onkeydown: sendByKeys });
  field.value = skeleton(inputs);
  return el("div", { class: "field wide" }, el("label", { for: "raw" }, "Request ", el("small", { text: "JSON, as the Open Inference Protocol has it" })), field);
}

function sendByKeys(event) {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) find("task-form").requestSubmit();
}

/** A place to drop an image at, to choose one, or to paste one. */
function fileControl(field, id) {
  const sound = field.parameters.media === "audio";
  const accept = sound ? "audio/*,.wav,.flac" : "image/*,.ppm,.pgm,.tif,.tiff";
  const input = el("input", { type: "file", id, class: "unseen", accept });
  const picture = el("img", { alt: "", hidden: true });
  const told = el("span", { class: "drop-told", text: `Drop ${sound ? "a recording" : "an image"} here, or choose one` });
  const zone = el("label", { class: "drop", for: id }, picture, told, input);
  const take = (file) => {
    if (!file) return;
    URL.revokeObjectURL(picture.src);
    shown.files[field.name] = file;
    told.textContent = `${file.name} · ${size(file.size)}`;
    picture.src = URL.createObjectURL(file);
    picture.alt = `Preview of ${file.name}`;
    picture.hidden = false;
    zone.classList.add("filled");
    say(`${file.name} is chosen.`);
  };
  picture.addEventListener("load", () => picture.classList.toggle("small", picture.naturalHeight < 96));
  picture.addEventListener("error", () => (picture.hidden = true)); // what this browser cannot draw is sent all the same
  input.addEventListener("change", () => take(input.files[0]));
  const over = (is) => (event) => {
    event.preventDefault();
    zone.classList.toggle("over", is);
    if (event.type === "drop") take(event.dataTransfer.files[0]);
  };
  for (const [type, is] of [["dragenter", true], ["dragover", true], ["dragleave", false], ["drop", false]]) {
    zone.addEventListener(type, over(is));
  }
  zone.addEventListener("paste", (event) => take(event.clipboardData.files[0]));
  return el("div", { class: "field wide" }, el("span", { class: "label" }, field.name, " ", about(field)), zone);
}

const size = (bytes) => (bytes < 1024 ? `${bytes} bytes` : `${(bytes / 1024).toFixed(bytes < 10240 ? 1 : 0)} KiB`);

/** Return the body's pieces; null, with the mistake shown, where something is missing. */
function pieces() {
  if (!shown.fields) return [find("raw").value];
  const values = {};
  for (const { name, kind } of shown.fields) {
    const typed = [...find("task-form").querySelectorAll("[data-input]")].filter((one) => one.dataset.input === name);
    values[name] = kind === "file" ? shown.files[name] : typed.map((one) => one.value);
  }
  try {
    return body(shown.fields, values);
  } catch (mistake) {
    find("task-answer").replaceChildren(card(mistake));
    return null;
  }
}

function curl() {
  const made = pieces();
  if (made) showCommand(command(`v2/models/${encodeURIComponent(shown.model)}/infer`, made));
}

export function connectForm() {
  find("task-form").addEventListener("submit", (event) => {
    event.preventDefault();
    predict();
  });
}

async function predict() {
  const mine = shown;
  const made = mine.running ? null : pieces();
  if (!made) return;
  mine.running = new AbortController();
  const place = find("task-answer");
  place.setAttribute("aria-busy", "true");
  try {
    const whole = (await Promise.all(made.map((piece) => (piece.file ? base64(piece.file) : piece)))).join("");
    const start = performance.now();
    const response = await call(`v2/models/${encodeURIComponent(mine.model)}/infer`, { body: whole, signal: mine.running.signal });
    const text = await response.text();
    const seconds = (performance.now() - start) / 1000;
    if (shown === mine) showAnswer(text, seconds);
  } catch (failure) {
    if (shown === mine && !mine.running.signal.aborted) place.replaceChildren(card(failure, [["Try again", predict]]));
  }
  mine.running = null;
  place.setAttribute("aria-busy", "false");
}

function showAnswer(text, seconds) {
  const answer = parse(text);
  const facts = [duration(seconds), `${answer.model_name}@${answer.model_version}`];
  find("task-answer").replaceChildren(
    table(answer),
    el("p", { class: "facts", id: "task-facts", text: facts.join(" · ") }),
    el("p", { class: "actions" }, copyButton(() => text, "Copy as JSON")));
  say(`Answered after ${facts[0]}.`);
}

async function base64(file) {
  const url = await new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
  return url.slice(url.indexOf(",") + 1);
}
