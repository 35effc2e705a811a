// Draws which elements share statistics for the shape that is typed, as docs/axes.py does.
"use strict";
(() => {
  const CELL = 26, GAP = 30, TOP = 40, LEFT = 14, MOST = 600;

  // The numbers of the groups as nested arrays [example][position][feature].
  function groups(shape, shared, parts) {
    const examples = shape[0], features = shape[shape.length - 1];
    const positions = shape.slice(1, -1).reduce((a, b) => a * b, 1);
    const counts = [
      shared.has("examples") ? 1 : examples,
      shared.has("positions") ? 1 : positions,
      shared.has("features") ? parts : features,
    ];
    const place = (index, axis, size) =>
      counts[axis] === size ? index : Math.floor((index * counts[axis]) / size);
    return Array.from({ length: examples }, (_, e) =>
      Array.from({ length: positions }, (_, p) =>
        Array.from({ length: features }, (_, f) =>
          (place(e, 0, examples) * counts[1] + place(p, 1, positions)) * counts[2] +
          place(f, 2, features))));
  }

  function svg(numbers, label) {
    const positions = numbers[0].length, features = numbers[0][0].length;
    const width = features * CELL, height = positions * CELL, out = [];
    numbers.forEach((rows, example) => {
      const left = LEFT + example * (width + GAP);
      out.push(`<text x="${left}" y="${TOP - 10}">example ${example}</text>`);
      rows.forEach((cells, row) => cells.forEach((number, column) => {
        const x = left + column * CELL, y = TOP + row * CELL;
        out.push(`<rect class="c${number % 8}" x="${x}" y="${y}" width="${CELL - 2}" ` +
          `height="${CELL - 2}"/><text class="n" x="${x + CELL / 2 - 1}" ` +
          `y="${y + CELL / 2 + 3}">${number}</text>`);
      }));
    });
    const total = LEFT + numbers.length * (width + GAP);
    return `<svg class="axes" role="img" aria-label="${label}" viewBox="0 0 ${total} ` +
      `${TOP + height + 24}" width="${total}">${out.join("")}<text x="${LEFT}" ` +
      `y="${TOP + height + 16}">rows: positions, columns: features</text></svg>`;
  }

  // What is wrong with a shape, or null.
  function problem(text, shape, parts) {
    if (!/^\s*\(?\s*\d+(\s*,\s*\d+)*\s*,?\s*\)?\s*$/.test(text)) return "Type sizes, such as 2, 3, 4.";
    if (shape.length < 2) return "x needs two axes or more: examples first, features last.";
    if (shape.includes(0)) return "Each size must be 1 or more.";
    if (shape[shape.length - 1] % parts)
      return `${parts} groups must divide the ${shape[shape.length - 1]} features.`;
    if (shape.reduce((a, b) => a * b, 1) > MOST) return `More than ${MOST} elements are too many to draw.`;
    return null;
  }

  function start(widget) {
    const input = widget.querySelector("input"), output = widget.querySelector("output");
    const shared = new Set(widget.dataset.shares.split(" "));
    const parts = Number(widget.dataset.groups || 1);
    const update = () => {
      const shape = (input.value.match(/\d+/g) || []).map(Number);
      const wrong = problem(input.value, shape, parts);
      input.toggleAttribute("aria-invalid", Boolean(wrong));
      if (wrong) { output.textContent = wrong; return; }
      const numbers = groups(shape, shared, parts);
      const count = 1 + Math.max(...numbers.flat(2));
      const size = shape.reduce((a, b) => a * b, 1) / count;
      output.textContent = `${count} ${count === 1 ? "mean" : "means"}, each of ${size} elements`;
      widget.querySelector("svg").outerHTML =
        svg(numbers, `${widget.dataset.norm}, x of shape (${shape.join(", ")})`);
    };
    input.addEventListener("input", update);
    update();
  }

  document.addEventListener("DOMContentLoaded", () =>
    document.querySelectorAll(".axes-widget").forEach(start));
})();
