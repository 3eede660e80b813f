// The conversation: turns are kept in the browser, and the last one can be edited and asked again.
import { ask, figures, request } from "./ask.js";
import { command, showCommand } from "./curl.js";
import { button, copyButton, eachFrame, el, find, grow, say } from "./dom.js";
import { card } from "./errors.js";
import { current } from "./settings.js";
import { forget, load, save } from "./store.js";

let turns = load("chat", []);
let running = null;
let shown = { model: () => "", completeInstead: () => {} };

/** Connect the view. `page` has `model()`, and `completeInstead(text)` for a model that cannot chat. */
export function connectChat(page) {
  shown = page;
  const [form, field] = [find("composer"), find("message")];
  const fit = grow(field);
  field.value = load("draft", "");
  fit();
  field.addEventListener("input", () => save("draft", field.value));
  field.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    form.requestSubmit();
  });
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    if (running || field.value.trim() === "" || !current()) return;
    turns.push({ role: "user", content: field.value });
    field.value = "";
    fit();
    forget("draft");
    answer();
  });
  find("stop-chat").addEventListener("click", stopChat);
  find("clear-chat").addEventListener("click", clear);
  find("curl-chat").addEventListener("click", showCurl);
  window.addEventListener("pagehide", () => save("chat", turns));
  draw();
}

export const stopChat = () => running?.abort();

function clear() {
  stopChat();
  turns = [];
  forget("chat");
  draw();
  say("The conversation is cleared.");
  find("message").focus();
}

function messages(system) {
  const opening = system.trim() ? [{ role: "system", content: system }] : [];
  return [...opening, ...turns.map(({ role, content }) => ({ role, content }))];
}

/** Ask the model for the next turn, and show it as it comes. */
async function answer() {
  const given = current();
  if (!given || running) return;
  const asked = request(shown.model(), { messages: messages(given.system) }, given.sampling);
  const told = { text: "" };
  const turn = { role: "assistant", content: "" };
  const mine = (running = new AbortController());
  draw();
  const [text, facts] = [document.createTextNode(""), el("p", { class: "facts" })];
  const waiting = el("article", { class: "turn assistant streaming", "aria-label": "Answer" },
    heading("assistant"), el("div", { class: "text" }, text), el("footer", {}, facts));
  find("log").append(waiting);
  busy(true);
  const show = eachFrame(() => follow(() => {
    text.appendData(told.text.slice(text.length));
    facts.textContent = figures(told).join(" · ");
  }));
  let failure = null;
  try {
    await ask(asked, told, show, mine.signal);
  } catch (error) {
    if (mine.signal.aborted) told.finish = "stopped";
    else failure = error;
  }
  running = null;
  busy(false);
  if (!turns.length) return draw(); // cleared meanwhile
  if (told.text || !(failure || told.finish === "stopped")) {
    turns.push({ ...turn, content: told.text, figures: figures(told) });
  }
  save("chat", turns);
  draw();
  if (failure) tell(failure);
  else say(told.finish === "stopped" ? "Stopped." : `Answered: ${figures(told).join(", ")}.`);
}

function tell(failure) {
  const last = turns.at(-1);
  const actions = [["Try again", retry]];
  if (failure.code === "no_chat_template") {
    actions.unshift(["Use completion instead", () => shown.completeInstead(last.content)]);
    failure.message = `This model has no chat template, so it cannot hold a conversation; it can go on with a text. (${failure.message})`;
  }
  follow(() => find("log").append(card(failure, actions)));
}

function busy(is) {
  const [send, stop] = [find("send"), find("stop-chat")];
  const focused = document.activeElement;
  find("log").setAttribute("aria-busy", String(is));
  send.hidden = is;
  stop.hidden = !is;
  if (focused === send && is) stop.focus();
  if (focused === stop && !is) find("message").focus();
}

/** Change the log, and stay at its end if the end was in sight. */
function follow(change) {
  const log = find("log");
  const atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 60;
  change();
  if (atEnd) log.scrollTop = log.scrollHeight;
}

function draw() {
  const log = find("log");
  const lastQuestion = turns.findLastIndex(({ role }) => role === "user");
  log.replaceChildren(...turns.map((turn, at) => article(turn, at === lastQuestion, at === turns.length - 1)));
  log.scrollTop = log.scrollHeight;
  find("welcome").hidden = turns.length > 0 || running !== null;
  find("clear-chat").disabled = turns.length === 0 && !running;
}

const heading = (role) => el("h2", { class: "who", text: role === "user" ? "You" : "Answer" });

function article(turn, isLastQuestion, isLast) {
  const actions = el("p", { class: "actions" }, copyButton(() => turn.content));
  if (!running && isLastQuestion) actions.append(button("Edit", () => edit(turn), { class: "edit" }));
  if (!running && isLast) actions.append(button("Retry", retry, { class: "retry" }));
  return el("article", { class: `turn ${turn.role}`, "aria-label": turn.role === "user" ? "You" : "Answer" },
    heading(turn.role),
    el("div", { class: "text", text: turn.content }),
    el("footer", {}, turn.figures && el("p", { class: "facts", text: turn.figures.join(" · ") }), actions));
}

/** Drop what came after the last question, and ask it again. */
function retry() {
  if (running || !current()) return;
  turns.length = turns.findLastIndex(({ role }) => role === "user") + 1;
  if (turns.length) answer();
  find("message").focus();
}

/** Put the last question into a field in its place. */
function edit(turn) {
  const article = find("log").children[turns.indexOf(turn)];
  const field = el("textarea", { class: "editing", "aria-label": "Your message", rows: 1 });
  field.value = turn.content;
  const send = () => {
    if (field.value.trim() === "" || !current()) return;
    turn.content = field.value;
    retry();
  };
  const leave = () => {
    draw();
    find("log").querySelector(".edit")?.focus();
  };
  field.addEventListener("keydown", (event) => {
    if (event.key === "Escape") leave();
    else if (event.key === "Enter" && !event.shiftKey && !event.isComposing) send();
    else return;
    event.preventDefault();
    event.stopPropagation();
  });
  article.querySelector(".text").replaceWith(field);
  article.querySelector(".actions").replaceChildren(button("Ask again", send), button("Cancel", leave));
  grow(field)();
  field.focus();
}

function showCurl() {
  const given = current();
  if (!given) return;
  const typed = find("message").value.trim() ? [{ role: "user", content: find("message").value }] : [];
  const upTo = typed.length ? turns.length : turns.findLastIndex(({ role }) => role === "user") + 1;
  const told = messages(given.system).slice(0, upTo + (given.system.trim() ? 1 : 0)).concat(typed);
  const { path, body } = request(shown.model(), { messages: told }, given.sampling);
  showCommand(command(path, [JSON.stringify(body)], true));
}
