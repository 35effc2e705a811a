// Filters the table of "Which norm?" by what is chosen for each of its first columns.
"use strict";
document.addEventListener("DOMContentLoaded", () => {
  const QUESTIONS = 3; // columns; a cell there lists options, or is "any"
  const table = document.querySelector("#which-norm table");
  if (!table) return;
  const rows = [...table.tBodies[0].rows];
  const options = (row, column) => row.cells[column].textContent.trim().split(", ");
  const controls = document.createElement("div");
  controls.className = "controls";
  const selects = [...table.tHead.rows[0].cells].slice(0, QUESTIONS).map((head, column) => {
    const label = document.createElement("label");
    const select = document.createElement("select");
    const all = rows.flatMap((row) => options(row, column));
    for (const option of new Set(["any", ...all])) select.append(new Option(option));
    label.append(head.textContent, select);
    controls.append(label);
    return select;
  });
  controls.addEventListener("change", () => {
    for (const row of rows) {
      row.hidden = !selects.every(({ value }, column) => {
        const fitting = options(row, column);
        return value === "any" || fitting.includes("any") || fitting.includes(value);
      });
    }
  });
  table.before(controls);
});
