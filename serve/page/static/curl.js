// A request as a command for the terminal.
import { address } from "./api.js";
import { key } from "./key.js";
import { copyButton, find } from "./dom.js";

export const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;

/** Return the command. `pieces` are texts of the body, and `{file}` where a file's base64 stands. */
export function command(path, pieces, streams = false) {
  const parts = [`curl ${streams ? "-N " : ""}${quoted(address(path))}`, "-H 'content-type: application/json'"];
  if (key()) parts.push('-H "authorization: Bearer $TANDEM_KEY"');
  const files = pieces.some((piece) => piece.file);
  const sent = parts.concat(files ? "-d @-" : `-d ${quoted(pieces.join(""))}`).join(" \\\n  ");
  if (!files) return sent;
  const made = pieces.map((piece) =>
    piece.file ? `base64 < ${quoted(piece.file.name)} | tr -d '\\n'` : `printf %s ${quoted(piece)}`);
  return `{ ${made.join("\n  ")}\n} | ${sent}`;
}

/** Show a command, to be copied. */
export function showCommand(text) {
  find("curl-text").textContent = text;
  find("curl-key").hidden = !key();
  find("curl-copy").replaceChildren(copyButton(() => text));
  find("curl-dialog").showModal();
}
