// Reads out every series at the x under the pointer, or, with the arrow keys, at the x before and after.
"use strict";
for (const plot of document.querySelectorAll(".plot")) {
  const series = JSON.parse(plot.dataset.series);
  const svg = plot.querySelector("svg");
  const tip = plot.querySelector(".tip");
  const cursor = plot.querySelector(".cursor");
  const width = svg.viewBox.baseVal.width;
  const near = 0.04 * width; // a series with no point this close to x has no value there
  const stops = [];
  for (const x of series.flatMap((line) => line.points.map((point) => point[0])).sort((a, b) => a - b)) {
    if (!stops.length || x - stops.at(-1) > 4) stops.push(x);
  }
  let at = -1;

  const closest = (points, x) =>
    points.reduce((best, point) => (Math.abs(point[0] - x) < Math.abs(best[0] - x) ? point : best), [Infinity]);

  function show(index) {
    if (index === at) return;
    at = index;
    const x = stops[at];
    const found = series.map((line) => closest(line.points, x)).map((point) => (Math.abs(point[0] - x) <= near ? point : null));
    const head = document.createElement("p");
    head.textContent = closest(found.filter(Boolean), x)[2];
    const rows = series.map((line, i) => {
      const row = document.createElement("p");
      const mark = document.createElement("i");
      mark.className = "s" + line.colour;
      const value = document.createElement("b");
      value.textContent = found[i] ? found[i][3] : "no value here";
      row.append(mark, line.name + " ", value);
      return row;
    });
    tip.replaceChildren(head, ...rows);
    tip.hidden = false;
    cursor.setAttribute("transform", `translate(${x} 0)`);
    cursor.setAttribute("visibility", "visible");
  }

  function hide() {
    at = -1;
    tip.hidden = true;
    cursor.setAttribute("visibility", "hidden");
  }

  function follow(event) {
    const box = svg.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * width;
    show(stops.indexOf(stops.reduce((best, stop) => (Math.abs(stop - x) < Math.abs(best - x) ? stop : best))));
  }

  plot.addEventListener("pointermove", follow);
  plot.addEventListener("pointerdown", follow);
  plot.addEventListener("pointerleave", hide);
  plot.addEventListener("focus", () => at < 0 && show(stops.length - 1));
  plot.addEventListener("blur", hide);
  plot.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (event.key === "Escape") hide();
    if (!step) return;
    event.preventDefault();
    show(at < 0 ? stops.length - 1 : Math.min(Math.max(at + step, 0), stops.length - 1));
  });
}
