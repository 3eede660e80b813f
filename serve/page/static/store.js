// What the browser keeps: settings and texts in localStorage, under names that begin with "tandem.".
import { say } from "./dom.js";

export function load(name, otherwise) {
  try {
    return JSON.parse(localStorage.getItem(`tandem.${name}`)) ?? otherwise;
  } catch {
    return otherwise; // no storage in this browser, or something else wrote there
  }
}

export function save(name, value) {
  try {
    localStorage.setItem(`tandem.${name}`, JSON.stringify(value));
  } catch (error) {
    say(`The browser did not keep this: ${error.message}`);
  }
}

export function forget(...names) {
  try {
    for (const name of names) localStorage.removeItem(`tandem.${name}`);
  } catch {
    // no storage, nothing to forget
  }
}
