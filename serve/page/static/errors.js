// An error, in full: what was said, where, and what can be done.
import { button, el } from "./dom.js";

/** Return a card that tells a failure. `actions` are [text, act] beside it. */
export function card(failure, actions = []) {
  const facts = [
    failure.status ? `HTTP ${failure.status}` : null,
    failure.code,
    failure.param && `at ${failure.param}`,
    failure.retryAfter && `try again in ${waiting(failure.retryAfter)}`,
    failure.requestId && `request ${failure.requestId}`,
  ];
  return el("div", { class: "error", role: "alert" },
    el("p", { class: "error-text", text: failure.message }),
    el("p", { class: "facts", text: facts.filter(Boolean).join(" · ") }),
    actions.length > 0 && el("p", { class: "actions" }, ...actions.map(([text, act]) => button(text, act))));
}

/** Retry-After is a number of seconds, or a date. */
const waiting = (text) => (/^\d+$/.test(text) ? `${text} s` : text);
