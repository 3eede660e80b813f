// One text from a model, streamed: its pieces, and how fast they came.
import { call, Failure, inBody } from "./api.js";
import { events } from "./stream.js";

const SECOND = 1000;

/** The route and the body of a request for a text. `asked` has `messages`, or a `prompt`. */
export function request(model, asked, sampling) {
  const path = asked.messages ? "v1/chat/completions" : "v1/completions";
  const stream = { stream: true, stream_options: { include_usage: true, continuous_usage_stats: true } };
  return { path, body: { model, ...asked, ...sampling, ...stream } };
}

/**
 * Stream an answer. `answer` is filled as it comes and `changed` is called after each piece, so that what has come is
 * there when this throws: Failure, or the abort of `signal`.
 */
export async function ask({ path, body }, answer, changed, signal) {
  const clock = new Clock();
  const response = await call(path, { body: JSON.stringify(body), signal });
  answer.model = body.model;
  answer.version = response.headers.get("x-tandem-model-version");
  try {
    for await (const data of events(response.body)) {
      take(JSON.parse(data), answer, clock, response);
      changed();
    }
  } catch (error) {
    if (signal.aborted || error instanceof Failure) throw error;
    throw new Failure(error.message, { requestId: response.headers.get("x-request-id") });
  }
}

function take(chunk, answer, clock, response) {
  if (chunk.error) throw inBody(chunk.error, { requestId: response.headers.get("x-request-id") });
  if (chunk.usage) answer.usage = chunk.usage;
  for (const choice of chunk.choices) {
    const piece = choice.delta ? choice.delta.content ?? "" : choice.text;
    answer.text += piece;
    if (piece) clock.heard(answer.usage?.completion_tokens ?? 0);
    answer.finish = choice.finish_reason ?? answer.finish;
  }
  Object.assign(answer, clock.told());
}

/** When the first and the last piece came, and how many tokens had come by then. */
class Clock {
  #start = performance.now();
  #first = null;
  #last = null;

  heard(tokens) {
    this.#last = { at: performance.now(), tokens };
    this.#first ??= this.#last;
  }

  told() {
    if (!this.#first) return {};
    const seconds = (this.#last.at - this.#first.at) / SECOND;
    const tokens = this.#last.tokens - this.#first.tokens;
    const rate = seconds > 0 && tokens > 0 ? tokens / seconds : null;
    return { ttft_s: (this.#first.at - this.#start) / SECOND, tokens_per_second: rate };
  }
}

/** What is told below an answer. */
export function figures(answer) {
  const told = [];
  if (answer.usage) {
    told.push(`${answer.usage.prompt_tokens} tokens in`, `${answer.usage.completion_tokens} out`);
  }
  if (answer.ttft_s !== undefined) told.push(`first after ${duration(answer.ttft_s)}`);
  if (answer.tokens_per_second) told.push(`${answer.tokens_per_second.toFixed(1)} tokens/s`);
  if (answer.finish) told.push(ENDS[answer.finish] ?? answer.finish);
  if (answer.model) told.push(answer.version ? `${answer.model}@${answer.version}` : answer.model);
  return told;
}

export const duration = (seconds) =>
  seconds < 1 ? `${Math.round(seconds * SECOND)} ms` : `${seconds.toFixed(seconds < 10 ? 2 : 1)} s`;

const ENDS = { stop: "ended by itself", length: "cut at max tokens", stopped: "stopped by you" };
