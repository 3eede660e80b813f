// Calls of the endpoint that served this page, and what it says where it refuses.
import { askForKey, key } from "./key.js";

/** An answer that is an error, or none at all: `status` is 0 where no answer came. */
export class Failure extends Error {
  constructor(message, { status = 0, code = null, param = null, retryAfter = null, requestId = null } = {}) {
    super(message);
    Object.assign(this, { status, code, param, retryAfter, requestId });
  }
}

export const address = (path) => new URL(path, document.baseURI).href;

/** Return the response to a request; a JSON text as `body` makes it a POST. Throws Failure, or the abort. */
export async function call(path, { body, signal } = {}) {
  const headers = { accept: "application/json" };
  if (body !== undefined) headers["content-type"] = "application/json";
  if (key()) headers.authorization = `Bearer ${key()}`;
  let response;
  try {
    response = await fetch(address(path), { method: body === undefined ? "GET" : "POST", headers, body, signal });
  } catch (error) {
    if (signal?.aborted) throw error;
    throw new Failure(`the endpoint does not answer (${error.message})`);
  }
  if (response.ok) return response;
  const failure = refusal(response, await response.text());
  if (failure.status !== 401 || !(await askForKey(key() ? "The endpoint does not take this key." : ""))) throw failure;
  return call(path, { body, signal });
}

/** Return the failure that an error's body tells: OpenAI's shape, the inference protocol's, or anything. */
export function refusal(response, text) {
  const about = {
    status: response.status,
    retryAfter: response.headers.get("retry-after"),
    requestId: response.headers.get("x-request-id"),
  };
  let told = null;
  try {
    told = JSON.parse(text).error;
  } catch {
    // no JSON: something in between answered
  }
  if (typeof told === "string") return new Failure(told, about);
  if (typeof told?.message === "string") return inBody(told, about);
  return new Failure(text.trim() || response.statusText || "no reason was given", about);
}

/** Return the failure that an error in OpenAI's shape tells, also in the middle of a stream. */
export const inBody = (told, about = {}) => new Failure(told.message, { ...about, code: told.code, param: told.param });

/** Parse JSON; whole numbers that JavaScript would round stay the text that they are. */
export const parse = (text) => JSON.parse(text, (_, value, context) =>
  typeof value === "number" && Number.isInteger(value) && !Number.isSafeInteger(value)
    ? context?.source ?? value
    : value);
