// Server-sent events out of a response's body.

/** Yield the data of each event until "[DONE]". Throws where the body ends before. */
export async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) throw new Error("the connection ended before the answer did");
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const line of lines) {
        const data = dataOf(line);
        if (data === "[DONE]") return;
        if (data !== null) yield data;
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // of a reader that was left early: the server frees what the request held
  }
}

const dataOf = (line) => (line.startsWith("data:") ? line.slice(5).replace(/\r$/, "").trimStart() : null);
