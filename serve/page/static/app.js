// The page: which models there are, which view fits the chosen one, and what holds for all views.
import { call } from "./api.js";
import { connectChat, stopChat } from "./chat.js";
import { connectCompletion, fitPrompt, setPrompt, stopCompletion } from "./completion.js";
import { el, find, say } from "./dom.js";
import { card } from "./errors.js";
import { connectForm, showForm, stopForm } from "./forms.js";
import { connectKey } from "./key.js";
import { connectSettings, fitSettings } from "./settings.js";
import { load, save } from "./store.js";

let models = [];

const chosen = () => models.find(({ id }) => id === find("model").value);

async function loadModels() {
  const place = find("page-error");
  place.replaceChildren();
  try {
    models = (await (await call("v1/models")).json()).data;
  } catch (failure) {
    models = [];
    show();
    place.replaceChildren(card(failure, [["Try again", loadModels]]));
    return;
  }
  const before = load("model", "");
  find("model").replaceChildren(...models.map(({ id, version }) => el("option", { value: id, text: `${id} · v${version}` })));
  if (models.some(({ id }) => id === before)) find("model").value = before;
  show();
  if (!models.length) place.replaceChildren(card({ message: "No model is served here." }, [["Look again", loadModels]]));
}

/** Show the view of the chosen model. */
function show() {
  const model = chosen();
  const mode = document.querySelector('input[name="mode"]:checked').value;
  document.body.dataset.view = !model ? "none" : model.generates ? mode : "task";
  for (const view of ["chat", "completion", "task"]) find(view).hidden = document.body.dataset.view !== view;
  find("mode").hidden = !model?.generates;
  find("settings").hidden = !model?.generates;
  fitSettings(mode);
  find("model").disabled = !models.length;
  about(model);
  if (model && !model.generates) showForm(model.id);
  if (document.body.dataset.view === "completion") fitPrompt();
}

function about(model) {
  const { task, version, architecture, run_id: run, quantization } = model ?? {};
  const told = [task, version && `version ${version}`, architecture, run && `run ${run}`, quantization && `quantised: ${named(quantization)}`];
  find("about").textContent = told.filter(Boolean).join(" · ");
  find("warning").textContent = model?.warning ? `Warning: ${model.warning}` : "";
}

const named = (value) => (typeof value === "string" ? value : value.scheme ?? value.method ?? JSON.stringify(value));

function connectTheme() {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const root = document.documentElement;
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : dark.matches);
  const tell = () => find("theme").setAttribute("aria-label", isDark() ? "Use the light theme" : "Use the dark theme");
  find("theme").addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    save("theme", root.dataset.theme);
    tell();
  });
  dark.addEventListener("change", tell);
  tell();
}

function connectModes() {
  const before = load("mode", "chat");
  for (const input of document.querySelectorAll('input[name="mode"]')) {
    input.checked = input.value === before;
    input.addEventListener("change", () => {
      save("mode", input.value);
      show();
    });
  }
  if (!document.querySelector('input[name="mode"]:checked')) find("mode-chat").checked = true;
}

/** Keep the settings open where there is room for them beside everything else. */
function connectRoom() {
  const narrow = matchMedia("(max-width: 60rem)");
  const fit = () => (find("settings").open = !narrow.matches);
  narrow.addEventListener("change", fit);
  fit();
}

function completeInstead(text) {
  find("mode-completion").checked = true;
  save("mode", "completion");
  show();
  setPrompt(text);
  say("Completion.");
}

function stopAll(event) {
  if (event.key !== "Escape" || document.querySelector("dialog[open]")) return;
  stopChat();
  stopCompletion();
  stopForm();
}

const model = () => find("model").value;
find("curl-close").addEventListener("click", () => find("curl-dialog").close());
find("model").addEventListener("change", () => {
  save("model", find("model").value);
  show();
});
document.addEventListener("keydown", stopAll);
connectTheme();
connectRoom();
connectModes();
connectSettings();
connectKey(loadModels);
connectChat({ model, completeInstead });
connectCompletion({ model });
connectForm();
loadModels();
