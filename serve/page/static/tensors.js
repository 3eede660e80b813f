// The Open Inference Protocol in a form's terms: fields out of a model's metadata, a body out of their values, rows out
// of an answer. Pure functions.

export const MOST_COLUMNS = 64;
const MOST_ZEROS = 256;
const WHOLE = /^-?(0|[1-9]\d*)$/;
const DECIMAL = /^-?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?$/;

/**
 * Return how each input is given: [{name, datatype, shape, kind, columns}], kind `file`, `text`, `flag` or `number`, or
 * of any length `texts` or `numbers`; null where one of them is none of these, so that the body is written as JSON.
 */
export function fields(inputs) {
  const found = inputs.map(field);
  return found.length && found.every(Boolean) ? found : null;
}

function field(input) {
  const { name, datatype, shape, parameters } = input;
  const inner = shape.slice(1).filter((size) => size !== 1);
  const one = { name, datatype, shape, parameters: parameters ?? {}, columns: 1 };
  if (parameters?.content_types?.includes("base64")) return { ...one, kind: "file" };
  if (inner.length === 1 && inner[0] === -1 && datatype !== "BOOL") return { ...one, kind: datatype === "BYTES" ? "texts" : "numbers" };
  if (inner.length > 1 || inner.some((size) => size < 1 || size > MOST_COLUMNS)) return null;
  const columns = inner[0] ?? 1;
  if (datatype === "BYTES") return columns === 1 ? { ...one, kind: "text" } : null;
  return { ...one, kind: datatype === "BOOL" ? "flag" : "number", columns };
}

/**
 * Return the pieces of the body for one row: texts, and {file} where a file's base64 stands. Numbers are sent as they
 * were typed, to the last digit.
 *
 * @param values by name: a File, or the texts of the columns. Throws Error naming the field.
 */
export function body(wanted, values) {
  const pieces = ['{"inputs":['];
  wanted.filter((one) => !(one.parameters?.optional && isEmpty(values[one.name]))).forEach((one, at) => {
    const file = one.kind === "file";
    const given = file ? values[one.name] : entries(one, values[one.name]);
    if (file && !given) throw new Error(`${one.name}: choose a file.`);
    const shape = file ? [1] : one.shape.map((size, axis) => (axis === 0 ? 1 : size === -1 ? given.length : size));
    const head = { name: one.name, datatype: file ? "BYTES" : one.datatype, shape };
    if (file) head.parameters = { content_type: "base64" };
    pieces.push(`${at ? "," : ""}${JSON.stringify(head).slice(0, -1)},"data":[`);
    pieces.push(...(file ? ['"', { file: given }, '"'] : [given.map((text, n) => literal(one, text, n)).join(",")]));
    pieces.push("]}");
  });
  pieces.push("]}");
  return joined(pieces);
}

const isEmpty = (given) => !given || (Array.isArray(given) && given.every((text) => text.trim() === ""));

/** Return the texts of an input's elements: as many as it has columns, or as many lines or numbers as were typed. */
function entries({ name, kind }, texts) {
  if (kind !== "texts" && kind !== "numbers") return texts;
  const found = kind === "texts" ? texts[0].replace(/\n+$/, "").split("\n") : texts[0].split(/[\s,;]+/).filter(Boolean);
  if (isEmpty(found)) throw new Error(`${name}: is empty.`);
  return found;
}

function joined(pieces) {
  const found = [];
  for (const piece of pieces) {
    if (typeof piece === "string" && typeof found.at(-1) === "string") found[found.length - 1] += piece;
    else found.push(piece);
  }
  return found;
}

function literal({ name, datatype, kind, columns }, text, column) {
  if (kind === "text" || kind === "texts") return JSON.stringify(text);
  const [typed, place] = [text.trim(), columns > 1 || kind === "numbers" ? `${name}[${column}]` : name];
  if (typed === "") throw new Error(`${place}: is empty.`);
  if (kind === "flag") return typed;
  const whole = datatype.includes("INT");
  if (!(whole ? WHOLE : DECIMAL).test(typed)) {
    throw new Error(`${place}: “${typed}” is not a ${whole ? "whole number" : "number"}, as ${datatype} asks.`);
  }
  return typed;
}

/** Return a body to begin with where it is written as JSON. */
export function skeleton(inputs) {
  const parts = inputs.map(({ name, datatype, shape }) => {
    const sizes = shape.map((size) => Math.max(size, 1));
    const count = sizes.reduce((product, size) => product * size, 1);
    const blank = datatype === "BYTES" ? "" : datatype === "BOOL" ? false : 0;
    return { name, datatype, shape: sizes, data: count <= MOST_ZEROS ? Array(count).fill(blank) : [] };
  });
  const lines = parts.map((part) => `  ${JSON.stringify(part)}`).join(",\n");
  return `{"inputs": [\n${lines}\n]}`;
}

/** Return the rows of an answer: for each row its outputs as {name, kind, …}, in the order of the answer. */
export function rows(answer) {
  const count = Math.max(0, ...answer.outputs.map(({ shape }) => shape[0] ?? 1));
  return Array.from({ length: count }, (_, row) => answer.outputs.map((output) => one(output, row)));
}

function one({ name, datatype, shape, data, parameters = {} }, row) {
  const size = shape.slice(1).reduce((product, length) => product * length, 1);
  const flat = data.flat(Infinity).slice(row * size, (row + 1) * size);
  const labels = parameters.labels?.length === size && datatype !== "BYTES" ? parameters.labels : null;
  if (labels) return { name, kind: "bars", bars: bars(labels, flat) };
  if (datatype === "BYTES" && parameters.content_type === "json") return { name, kind: "json", text: pretty(flat) };
  if (datatype === "BYTES" && parameters.content_type === "base64") return { name, kind: "bytes", texts: flat };
  if (datatype === "BYTES") return { name, kind: "text", text: flat.join("\n") };
  const single = datatype === "FP32" || datatype === "FP16";
  return { name, kind: "values", values: single ? flat.map(shortened) : flat, shape: shape.slice(1) };
}

/** Return a number of 32 bits without the digits that it gets when it is written as one of 64. */
const shortened = (value) => (typeof value === "number" ? Number(value.toPrecision(7)) : value);

/** Return labels with their values, the largest first, and how long a bar each has, from 0 to 1. */
export function bars(labels, values) {
  const shares = values.every((value) => value >= 0 && value <= 1);
  const largest = shares ? 1 : Math.max(...values.map(Math.abs), Number.MIN_VALUE);
  return labels
    .map((label, at) => ({ label, value: values[at], length: Math.abs(values[at]) / largest, below: values[at] < 0 }))
    .sort((a, b) => b.value - a.value);
}

function pretty(texts) {
  return texts.map((text) => {
    try {
      return JSON.stringify(JSON.parse(text), null, 2);
    } catch {
      return text;
    }
  }).join("\n");
}
