// Draws which elements share statistics for the shape that is typed, as docs/axes.py does.
"use strict";
(() => {
  const CELL = 26, GAP = 30, TOP = 40, LEFT = 14, MOST = 600;
  const product = (sizes) => sizes.reduce((a, b) => a * b, 1);

  // How many groups there are along examples, positions and features.
  function counts([examples, positions, features], shared, parts) {
    return [
      shared.has("examples") ? 1 : examples,
      shared.has("positions") ? 1 : positions,
      shared.has("features") ? parts : features,
    ];
  }

  // The numbers of the groups as nested arrays [example][position][feature].
  function groups(sizes, counts) {
    const [examples, positions, features] = sizes;
    const place = (index, axis) => Math.floor((index * counts[axis]) / sizes[axis]);
    return Array.from({ length: examples }, (_, e) =>
      Array.from({ length: positions }, (_, p) =>
        Array.from({ length: features }, (_, f) =>
          (place(e, 0) * counts[1] + place(p, 1)) * counts[2] + place(f, 2))));
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

  // The sizes that are typed: (2, 3, 4), 2 3 4 or 2x3x4; NaN for what is no number.
  function read(text) {
    const parts = text.replace(/[()[\]]/g, " ").split(/[\s,x×]+/i).filter(Boolean);
    return parts.map((part) => (/^\d+$/.test(part) ? Number(part) : NaN));
  }

  // What is wrong with a shape, or null.
  function problem(shape, parts) {
    const features = shape[shape.length - 1];
    if (!shape.length || shape.some(Number.isNaN)) return "Type sizes, such as 2, 3, 4.";
    if (shape.length < 2) return "x needs two axes or more: examples first, features last.";
    if (shape.includes(0)) return "Each size must be 1 or more.";
    if (!(parts >= 1)) return "num_groups must be 1 or more.";
    if (features % parts) return `${parts} groups must divide the ${features} features.`;
    return null;
  }

  // How many statistics there are, and of how many elements: `summary` of docs/axes.py.
  function summary(name, count, size) {
    const one = name === "rms_norm" ? "mean square" : "mean";
    const means = `${count} ${one}${count === 1 ? "" : "s"}, each of `;
    if (size > 1) return `${means}${size} elements`;
    const result = name === "rms_norm" ? "only the sign of x is left" : "the result is the bias";
    return `${means}1 element: ${result}`;
  }

  function start(widget) {
    const input = widget.querySelector("input.shape"), output = widget.querySelector("output");
    const field = widget.querySelector("input.groups"), name = widget.dataset.norm;
    const shared = new Set(widget.dataset.shares.split(" "));
    const update = () => {
      const shape = read(input.value), parts = field ? read(field.value)[0] : 1;
      const wrong = problem(shape, parts);
      const isGroups = Boolean(wrong && wrong.includes("groups"));
      input.setAttribute("aria-invalid", String(Boolean(wrong) && !isGroups));
      if (field) field.setAttribute("aria-invalid", String(isGroups));
      const sizes = [shape[0], product(shape.slice(1, -1)), shape[shape.length - 1]];
      const elements = product(shape), drawn = !wrong && elements <= MOST;
      if (wrong) {
        output.textContent = wrong;
      } else {
        const each = counts(sizes, shared, parts), count = product(each);
        output.textContent = summary(name, count, elements / count) + (drawn ? "" : "; too many to draw");
        if (drawn)
          widget.querySelector("svg").outerHTML =
            svg(groups(sizes, each), `${name}, x of shape (${shape.join(", ")})`);
      }
      widget.querySelector(".picture").hidden = !drawn;
    };
    widget.addEventListener("input", update);
    update();
  }

  document.addEventListener("DOMContentLoaded", () =>
    document.querySelectorAll(".axes-widget").forEach(start));
})();
