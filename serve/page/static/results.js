// The answer of a model that generates no text, as a table.
import { button, copyButton, el } from "./dom.js";
import { rows } from "./tensors.js";

const FIRST_BARS = 10;
const FIRST_VALUES = 100;

/** Return the answer as a table: an output a line, and bars where values belong to labels. */
export function table(answer) {
  const found = rows(answer);
  return el("div", { class: "results" }, ...found.map((outputs, at) =>
    el("table", {},
      el("caption", { text: found.length > 1 ? `Row ${at + 1}` : "Answer" }),
      el("tbody", {}, ...outputs.map((output) =>
        el("tr", {}, el("th", { scope: "row", text: output.name }), el("td", {}, SHOWN[output.kind](output))))))));
}

const SHOWN = {
  bars: ({ bars }) => chart(bars),
  json: ({ text }) => el("pre", { text }),
  text: ({ text }) => el("span", { class: "text", text }),
  bytes: ({ texts }) => el("span", {}, ...texts.map((text) =>
    el("span", { class: "bytes" }, picture(text), `${Math.floor((text.replace(/=+$/, "").length * 3) / 4)} bytes `, copyButton(() => text, "Copy base64")))),
  values: ({ values, shape }) => numbers(values, shape),
};

/** Draw bytes that are a picture: PNG or JPEG, by their first bytes. */
function picture(text) {
  const kind = text.startsWith("iVBORw0KGgo") ? "png" : text.startsWith("/9j/") ? "jpeg" : null;
  if (!kind) return null;
  const bytes = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
  return el("img", { class: "answer", alt: "The answer, a picture", src: URL.createObjectURL(new Blob([bytes], { type: `image/${kind}` })) });
}

function chart(bars) {
  const lines = bars.map(({ label, value, length, below }) => {
    const bar = el("span", { class: below ? "bar below" : "bar", "aria-hidden": "true" });
    bar.style.setProperty("--length", String(length));
    return el("tr", {}, el("th", { scope: "row", text: label }), el("td", { class: "number", text: short(value) }), el("td", {}, bar));
  });
  const body = el("tbody", {}, ...lines.slice(0, FIRST_BARS));
  const made = el("table", { class: "chart" }, el("caption", { class: "unseen", text: "Scores by label" }), body);
  return bars.length > FIRST_BARS ? el("div", {}, made, more(bars.length - FIRST_BARS, () => body.append(...lines.slice(FIRST_BARS)))) : made;
}

function numbers(values, shape) {
  const all = values.map(String).join(", ");
  const text = el("span", { class: "text number", text: values.slice(0, FIRST_VALUES).map(String).join(", ") });
  const told = shape.length ? el("span", { class: "facts", text: ` [${shape.join(" × ")}]` }) : null;
  const rest = values.length - FIRST_VALUES;
  return el("div", {}, text, told, rest > 0 && more(rest, () => (text.textContent = all)));
}

/** Return a button that shows what was left out, and says how much it is. */
function more(count, show) {
  const made = button(`Show ${count.toLocaleString("en")} more`, () => {
    show();
    made.remove();
  });
  return made;
}

const short = (value) => (Number.isInteger(value) ? String(value) : value.toPrecision(4));
