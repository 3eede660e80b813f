// The API key: asked for only where the endpoint wants one, and kept in this tab unless told otherwise.
import { find, say } from "./dom.js";

const NAME = "tandem.key";

function each(act) {
  for (const place of ["sessionStorage", "localStorage"]) {
    try {
      act(window[place]);
    } catch {
      // this browser keeps nothing: the key lives as long as the page
    }
  }
}

let inMemory = "";

export function key() {
  let found = inMemory;
  each((storage) => (found ||= storage.getItem(NAME) ?? ""));
  return found;
}

export function forgetKey() {
  inMemory = "";
  each((storage) => storage.removeItem(NAME));
  find("key").hidden = true;
}

function keep(text, longer) {
  forgetKey();
  inMemory = text;
  try {
    (longer ? localStorage : sessionStorage).setItem(NAME, text);
  } catch (error) {
    say(`The browser did not keep the key: ${error.message}`);
  }
  find("key").hidden = false;
}

let asked = null;

/** Ask for a key; resolves with whether one was given. `why` says what is wrong with the one there is. */
export function askForKey(why = "") {
  asked ??= new Promise((resolve) => {
    const [dialog, field] = [find("key-dialog"), find("key-text")];
    find("key-why").textContent = why || "This endpoint answers only to those who have an API key.";
    find("key-forget").hidden = !key();
    field.value = "";
    dialog.returnValue = "";
    dialog.addEventListener("close", () => {
      const given = dialog.returnValue === "use" && field.value.trim() !== "";
      if (given) keep(field.value.trim(), find("key-longer").checked);
      field.value = "";
      asked = null;
      resolve(given);
    }, { once: true });
    dialog.showModal();
  });
  return asked;
}

/** Connect the dialog and the button by which a key is changed or forgotten; `changed` is called after either. */
export function connectKey(changed) {
  find("key").hidden = !key();
  find("key").addEventListener("click", async () => {
    if (await askForKey("A key is in use. Another one takes its place.")) changed();
  });
  find("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    find("key-dialog").close("use");
  });
  find("key-cancel").addEventListener("click", () => find("key-dialog").close(""));
  find("key-forget").addEventListener("click", () => {
    forgetKey();
    find("key-dialog").close("");
    changed();
  });
}
