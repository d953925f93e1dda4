"use strict";
// Draws the charts to fit the screen and its colour scheme, and sorts the tables.
(() => {
  const read = (id) => JSON.parse(document.getElementById(id).textContent);
  const themes = read("themes");
  const specifications = read("specifications");
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const views = new Map();

  // The same rule as Panels.layout in panels.py.
  function fit(specification, width) {
    const { count, minimum, preferred, across, beside } = specification.usermeta.panels;
    const columns = Math.max(1, Math.min(across ?? count, count, Math.floor(width / (minimum + beside))));
    const share = Math.floor(width / columns) - beside;
    const panel = Math.max(minimum, Math.min(preferred, share));
    const fitted = structuredClone(specification);
    delete fitted.title; // the page has its own heading
    if (fitted.concat) {
      fitted.columns = columns;
      for (const view of fitted.concat) view.width = panel;
    } else if (fitted.facet) {
      fitted.columns = columns;
      fitted.spec.width = panel;
    } else {
      fitted.width = panel;
    }
    return fitted;
  }

  async function draw(box) {
    const name = box.dataset.figure;
    try {
      const { view } = await vegaEmbed(box, fit(specifications[name], box.clientWidth), {
        mode: "vega-lite",
        renderer: "svg",
        actions: false,
        defaultStyle: false,
        ast: true, // interpreted expressions: the page forbids eval
        config: themes[dark.matches ? "dark" : "light"],
        tooltip: { disableDefaultStyle: true },
      });
      views.get(name)?.finalize();
      views.set(name, view);
    } catch (error) {
      box.textContent = `This chart could not be drawn: ${error.message}`;
      console.error(name, error);
    }
  }

  const boxes = [...document.querySelectorAll("[data-figure]")];
  let width = 0;

  async function drawAll() {
    width = document.documentElement.clientWidth;
    for (const box of boxes) await draw(box);
    document.documentElement.dataset.charts = "drawn";
  }

  let waiting = 0;
  addEventListener("resize", () => {
    clearTimeout(waiting);
    waiting = setTimeout(() => {
      if (document.documentElement.clientWidth !== width) drawAll();
    }, 200);
  });
  dark.addEventListener("change", drawAll);

  async function save(button) {
    const name = button.closest("figure").id;
    const link = document.createElement("a");
    link.href = await views.get(name).toImageURL(button.dataset.save, 2);
    link.download = `${name}.${button.dataset.save}`;
    link.click();
  }

  // Missing values stay at the end in both directions; equal rows keep their order.
  function sort(button) {
    const head = button.closest("th");
    const column = head.cellIndex;
    const ascending = head.getAttribute("aria-sort") !== "ascending";
    const body = head.closest("table").tBodies[0];
    const sign = ascending ? 1 : -1;
    const compare = (a, b) => {
      const [x, y] = [a.cells[column], b.cells[column]];
      const [absent, other] = [x, y].map((cell) => cell.className === "none");
      if (absent || other) return absent - other;
      if (x.dataset.value && y.dataset.value) return sign * (x.dataset.value - y.dataset.value);
      return sign * x.textContent.localeCompare(y.textContent, "en", { numeric: true });
    };
    body.append(...[...body.rows].sort(compare));
    for (const other of head.parentElement.cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", ascending ? "ascending" : "descending");
  }

  for (const table of document.querySelectorAll(".table table")) {
    const first = table.tBodies[0].rows[0];
    for (const head of table.tHead.rows[0].cells) {
      const cell = first?.cells[head.cellIndex];
      if (cell?.dataset.value || cell?.className === "none") head.classList.add("numeric");
    }
  }
  document.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (button?.closest("th")) sort(button);
    if (button?.dataset.save) save(button);
  });

  addEventListener("beforeprint", () => {
    for (const part of document.querySelectorAll("#provenance details")) part.open = true;
  });

  drawAll();
})();
