// Completion: a text, and how the model goes on with it.
import { ask, figures, request } from "./ask.js";
import { command, showCommand } from "./curl.js";
import { copyButton, eachFrame, find, grow, say } from "./dom.js";
import { card } from "./errors.js";
import { current } from "./settings.js";
import { forget, load, save } from "./store.js";

let running = null;
let last = load("continuation", null);
let model = () => "";
let fit = () => {};

export function connectCompletion(page) {
  model = page.model;
  const [form, field] = [find("completion-form"), find("prompt")];
  fit = grow(field);
  field.value = load("prompt", "");
  field.addEventListener("input", () => save("prompt", field.value));
  field.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
  });
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    complete();
  });
  find("stop-completion").addEventListener("click", stopCompletion);
  find("take-over").addEventListener("click", () => setPrompt(field.value + last.text));
  find("continuation-actions").prepend(copyButton(() => last?.text ?? ""));
  find("clear-completion").addEventListener("click", clear);
  find("curl-completion").addEventListener("click", () => {
    const asked = made();
    if (asked) showCommand(command(asked.path, [JSON.stringify(asked.body)], true));
  });
  draw();
}

export const stopCompletion = () => running?.abort();

/** Put a text into the field, as if it had been typed. */
export function setPrompt(text) {
  const field = find("prompt");
  field.value = text;
  save("prompt", text);
  last = null;
  forget("continuation");
  draw();
  fit();
  field.focus();
}

export const fitPrompt = () => fit();

function clear() {
  stopCompletion();
  find("completion-error").replaceChildren();
  setPrompt("");
  forget("prompt");
  say("The text is cleared.");
}

function made() {
  const given = current();
  return given && request(model(), { prompt: find("prompt").value }, given.sampling);
}

async function complete() {
  const asked = running ? null : made();
  if (!asked) return;
  const mine = (running = new AbortController());
  const told = { text: "" };
  last = told;
  find("completion-error").replaceChildren();
  busy(true);
  const show = eachFrame(() => {
    told.figures = figures(told);
    draw();
  });
  let failure = null;
  try {
    draw();
    await ask(asked, told, show, mine.signal);
  } catch (error) {
    if (mine.signal.aborted) told.finish = "stopped";
    else failure = error;
  }
  running = null;
  busy(false);
  if (last !== told) return; // cleared meanwhile
  told.figures = figures(told);
  save("continuation", { text: told.text, figures: told.figures });
  draw();
  if (failure) find("completion-error").replaceChildren(card(failure, [["Try again", complete]]));
  else say(told.finish === "stopped" ? "Stopped." : `Done: ${told.figures.join(", ")}.`);
}

function busy(is) {
  const [go, stop] = [find("complete"), find("stop-completion")];
  const focused = document.activeElement;
  find("continuation").setAttribute("aria-busy", String(is));
  go.hidden = is;
  stop.hidden = !is;
  if (focused === go && is) stop.focus();
  if (focused === stop && !is) go.focus();
}

function draw() {
  find("continuation-part").hidden = last === null;
  find("continuation").textContent = last?.text ?? "";
  find("continuation").classList.toggle("streaming", running !== null);
  find("completion-figures").textContent = last?.figures?.join(" · ") ?? "";
  find("take-over").disabled = running !== null;
}
