"use strict";
// Everything is readable without this: it sorts, filters and points from rows to bars.
for (const table of document.querySelectorAll("table")) {
  const body = table.tBodies[0];
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const sign = down ? -1 : 1;
      const order = (a, b) => {
        const [x, y] = [a.cells[column], b.cells[column]];
        if ("sort" in x.dataset && "sort" in y.dataset) return sign * (x.dataset.sort - y.dataset.sort);
        // Cells without a number stand behind those that have one.
        if ("sort" in x.dataset || "sort" in y.dataset) return "sort" in x.dataset ? -1 : 1;
        return sign * x.textContent.localeCompare(y.textContent, "en", { numeric: true });
      };
      body.append(...[...body.rows].sort(order));
    });
  });
  if (table.hasAttribute("data-filter")) {
    const label = document.createElement("label");
    const input = document.createElement("input");
    label.className = "filter";
    input.type = "search";
    label.append("Show rows with", input);
    table.parentNode.before(label);
    input.addEventListener("input", () => {
      const wanted = input.value.trim().toLowerCase();
      for (const row of body.rows) row.hidden = !row.textContent.toLowerCase().includes(wanted);
    });
  }
}
// A bar and the row of the same layer or output light up together.
for (const bar of document.querySelectorAll("svg [data-key]")) {
  const section = bar.closest("section");
  const row = [...section.querySelectorAll("tbody tr")].find(
    (one) => [...one.cells].some((cell) => cell.textContent === bar.dataset.key));
  if (!row) continue;
  for (const [from, to] of [[bar, row], [row, bar]]) {
    from.addEventListener("mouseenter", () => to.classList.add("lit"));
    from.addEventListener("mouseleave", () => to.classList.remove("lit"));
  }
}
