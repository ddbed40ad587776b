"use strict";
(() => {
  const readout = document.getElementById("readout");

  // Browsers show titles of SVG elements late and in their own font, so the read-out shows them instead.
  document.querySelectorAll(".described").forEach((mark) => {
    const title = mark.querySelector("title");
    const text = title.textContent;
    title.remove();
    mark.addEventListener("pointermove", (event) => {
      const [first, ...rest] = text.split("\n");
      readout.replaceChildren(Object.assign(document.createElement("b"), { textContent: first }), rest.map((line) => `\n${line}`).join(""));
      readout.hidden = false;
      const room = document.documentElement.clientWidth;
      const left = event.clientX + 16 + readout.offsetWidth > room ? event.clientX - readout.offsetWidth - 16 : event.clientX + 16;
      readout.style.left = `${Math.max(left, 4) + scrollX}px`;
      readout.style.top = `${event.clientY + 14 + scrollY}px`;
    });
    mark.addEventListener("pointerleave", () => { readout.hidden = true; });
  });

  document.querySelectorAll("table.sortable").forEach((table) => {
    const body = table.tBodies[0];
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) => head.querySelector("button")?.addEventListener("click", () => {
      const key = (row) => {
        const text = row.cells[column].dataset.sort;
        return text === "" ? NaN : Number.isNaN(Number(text)) ? text : Number(text);
      };
      // Numbers start with the largest, names with the first; missing numbers stay at the end.
      const numbers = [...body.rows].some((row) => typeof key(row) === "number" && !Number.isNaN(key(row)));
      const order = head.getAttribute("aria-sort");
      const up = order === "none" ? !numbers : order === "descending";
      heads.forEach((other) => other.hasAttribute("aria-sort") && other.setAttribute("aria-sort", "none"));
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      body.append(...[...body.rows].sort((a, b) => {
        const [one, two] = [key(a), key(b)];
        if (Number.isNaN(one) || Number.isNaN(two)) return Number.isNaN(one) - Number.isNaN(two);
        return (one < two ? -1 : one > two ? 1 : 0) * (up ? 1 : -1);
      }));
    }));
  });
})();
