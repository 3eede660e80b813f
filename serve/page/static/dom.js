// Elements made without HTML: whatever a model, a server or a file says becomes text.

/** Return an element. `on…` are listeners, `text` its text, `dataset` and properties as the DOM has them. */
export function el(tag, options = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(options)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "text") node.textContent = value;
    else if (name === "class") node.className = value;
    else if (name === "dataset") Object.assign(node.dataset, value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

export const find = (id) => document.getElementById(id);

export const button = (text, onclick, more = {}) => el("button", { type: "button", text, onclick, ...more });

/** Tell people who listen to the page what has happened. */
export function say(text) {
  find("status").textContent = text;
}

/** Copy a text; beyond localhost and HTTPS browsers have no clipboard interface, so there by way of a selection. */
export async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    const field = el("textarea", { class: "unseen", "aria-hidden": "true" });
    field.value = text;
    (document.querySelector("dialog[open]") ?? document.body).append(field);
    field.select();
    const copied = document.execCommand("copy");
    field.remove();
    if (!copied) return say("The browser refused to copy.");
  }
  say("Copied.");
}

/** Return a button that copies what `text()` returns, says so for a moment, and keeps the focus. */
export function copyButton(text, label = "Copy") {
  const made = button(label, async () => {
    await copy(text());
    made.focus();
    made.textContent = "Copied";
    setTimeout(() => (made.textContent = label), 1500);
  });
  return made;
}

/** Let a text area grow with its text, up to what the style allows. */
export function grow(area) {
  const fit = () => {
    area.style.height = "auto";
    area.style.height = `${area.scrollHeight + 2}px`;
  };
  area.addEventListener("input", fit);
  return fit;
}

/** Return a function that calls `draw` at most once a frame, and at once where nothing is drawn (a hidden tab). */
export function eachFrame(draw) {
  let asked = false;
  return () => {
    if (document.hidden) return draw();
    if (asked) return;
    asked = true;
    requestAnimationFrame(() => {
      asked = false;
      draw();
    });
  };
}
