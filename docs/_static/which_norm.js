// Shows the answers of "Which norm?" that fit what is chosen. Without a script all are shown.
"use strict";
(() => {
  function start(choices) {
    const questions = JSON.parse(choices.dataset.questions);
    const controls = document.createElement("div");
    controls.className = "controls";
    const selects = Object.entries(questions).map(([name, question]) => {
      const label = document.createElement("label");
      const select = document.createElement("select");
      select.name = name;
      select.append(new Option("any", ""));
      for (const [value, text] of Object.entries(question.options))
        select.append(new Option(text, value));
      label.append(question.label, select);
      controls.append(label);
      return select;
    });
    const none = document.createElement("p");
    const update = () => {
      const chosen = selects.some((select) => select.value);
      let shown = 0;
      for (const part of choices.querySelectorAll(".answer, .several")) {
        const fits = selects.every(({ name, value }) => {
          const values = part.getAttribute(`data-${name}`);
          return !value || values === null || values.split(" ").includes(value);
        });
        const isAnswer = part.matches(".answer");
        part.hidden = !fits || (isAnswer && !chosen);
        shown += isAnswer && !part.hidden;
      }
      none.textContent = chosen ? "No run covers this." : "Choose a network.";
      none.hidden = shown > 0;
    };
    controls.addEventListener("change", update);
    choices.prepend(controls);
    choices.append(none);
    update();
  }

  document.addEventListener("DOMContentLoaded", () =>
    document.querySelectorAll(".choices").forEach(start));
})();
