// Sets the theme that was chosen before the page is drawn. A classic script: a module would run after the first paint.
"use strict";
(() => {
  try {
    const chosen = JSON.parse(localStorage.getItem("tandem.theme"));
    if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
  } catch {
    // nothing is kept in this browser: the system's theme it is
  }
})();
