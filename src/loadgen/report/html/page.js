"use strict";
for (const button of document.querySelectorAll("button[data-toggle]")) {
  button.addEventListener("click", () => {
    const shown = button.getAttribute("aria-pressed") !== "true";
    button.setAttribute("aria-pressed", String(shown));
    const figure = button.closest("figure");
    for (const mark of figure.querySelectorAll(`svg .${button.dataset.toggle}`)) {
      mark.classList.toggle("hidden", !shown);
    }
  });
}
