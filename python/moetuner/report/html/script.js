"use strict";
// Without this script the page shows the same figures; it adds numbers under the
// pointer, the choice of a layer, and files of the tables.
(() => {
  const lines = new Map();
  const rows = (table) => {
    if (!lines.has(table)) {
      const text = document.getElementById(`csv-${table}`);
      lines.set(table, text ? text.textContent.split("\n").map((l) => l.split(",")) : null);
    }
    return lines.get(table);
  };

  // "table column-stride row-stride offset column", or "table expert,expert,...".
  const words = (lookup, row, column) => {
    const [table, ...rest] = lookup.split(" ");
    const found = rows(table);
    if (rest.length === 1) {
      const order = rest[0].split(",");
      const [a, b] = [order[row], order[column]];
      if (a === b) return `expert ${a}`;
      const count = found ? `: ${found[1 + Number(a)][1 + Number(b)]} tokens` : "";
      return `experts ${a} and ${b}${count}`;
    }
    if (!found) return null;
    const [dx, dy, offset, cell] = rest.map(Number);
    const line = found[1 + offset + column * dx + row * dy];
    return `${found[0][0]} ${line[0]}, ${found[0][1]} ${line[1]}: ${line[cell] || "–"}`;
  };

  const tip = document.createElement("div");
  tip.id = "tip";
  tip.hidden = true;
  document.body.append(tip);
  const show = (event) => {
    const svg = event.target.closest("svg[data-area]");
    tip.hidden = true;
    if (!svg) return;
    const [left, top, width, height, rowCount, columnCount] =
      svg.dataset.area.split(" ").map(Number);
    const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(
      svg.getScreenCTM().inverse());
    const row = Math.floor(((at.y - top) / height) * rowCount);
    const column = Math.floor(((at.x - left) / width) * columnCount);
    if (row < 0 || column < 0 || row >= rowCount || column >= columnCount) return;
    const text = words(svg.dataset.lookup, row, column);
    if (!text) return;
    tip.textContent = text;
    tip.hidden = false;
    const x = Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8);
    const y = event.clientY - tip.offsetHeight - 12;
    tip.style.left = `${Math.max(8, x)}px`;
    tip.style.top = `${y < 4 ? event.clientY + 18 : y}px`;
  };
  document.addEventListener("pointermove", show, { passive: true });
  document.addEventListener("pointerdown", show, { passive: true });
  document.addEventListener("scroll", () => { tip.hidden = true; }, { passive: true });

  for (const select of document.querySelectorAll("select[data-shows]")) {
    select.value = select.options[0].value;
    select.addEventListener("change", () => {
      for (const part of select.closest("section").querySelectorAll("[data-layer]")) {
        part.hidden = part.dataset.layer !== select.value;
      }
    });
  }

  for (const pre of document.querySelectorAll(".numbers pre")) {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = "Save as CSV";
    button.addEventListener("click", () => {
      const link = document.createElement("a");
      link.href = URL.createObjectURL(new Blob([`${pre.textContent}\n`], { type: "text/csv" }));
      link.download = `${pre.id.slice(4)}.csv`;
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href), 1000);
    });
    pre.after(button);
  }
})();
