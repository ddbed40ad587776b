"use strict";
(() => {
  const charts = JSON.parse(document.getElementById("chart-data").textContent);
  const readout = document.getElementById("readout");
  const say = (value) => value === null ? "not finite" : String(Number(value.toPrecision(5)));
  const nearest = (steps, step) => {
    let low = 0, high = steps.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (steps[middle] < step) low = middle; else high = middle;
    }
    return Math.abs(steps[low] - step) <= Math.abs(steps[high] - step) ? low : high;
  };
  const figures = document.querySelectorAll("svg[data-chart]");
  const drawn = charts.map((chart, place) => ({ chart, svg: figures[place] }));

  const hover = ({ chart, svg }, event) => {
    const box = svg.getBoundingClientRect();
    const at = ((event.clientX - box.left) / box.width * chart.width - chart.left) / (chart.right - chart.left);
    if (at < -0.03 || at > 1.03) return leave();
    const wanted = chart.span[0] + at * (chart.span[1] - chart.span[0]);
    const steps = chart.series.map((one) => one.steps[nearest(one.steps, wanted)]);
    const step = steps.reduce((best, one) => Math.abs(one - wanted) < Math.abs(best - wanted) ? one : best);
    readout.replaceChildren(Object.assign(document.createElement("b"), { textContent: `step ${step.toLocaleString("en")}` }));
    chart.series.forEach((one) => {
      const index = nearest(one.steps, step);
      const line = document.createElement("span");
      line.className = `key hue-${one.hue}${one.dashed ? " dashed" : ""}`;
      const elsewhere = one.steps[index] === step ? "" : ` (step ${one.steps[index].toLocaleString("en")})`;
      line.textContent = `${one.name} ${say(one.values[index])}${elsewhere}`;
      readout.append(line);
    });
    readout.hidden = false;
    const room = document.documentElement.clientWidth;
    const left = event.clientX + 16 + readout.offsetWidth > room ? event.clientX - readout.offsetWidth - 16 : event.clientX + 16;
    readout.style.left = `${Math.max(left, 4) + scrollX}px`;
    readout.style.top = `${event.clientY + 14 + scrollY}px`;
    drawn.forEach((other) => {
      const line = other.svg.querySelector(".crosshair");
      const [first, last] = other.chart.span;
      const x = other.chart.left + (step - first) / (last - first) * (other.chart.right - other.chart.left);
      line.setAttribute("x1", x);
      line.setAttribute("x2", x);
      line.setAttribute("visibility", "visible");
    });
  };
  const leave = () => {
    readout.hidden = true;
    drawn.forEach(({ svg }) => svg.querySelector(".crosshair").setAttribute("visibility", "hidden"));
  };
  drawn.forEach((one) => {
    one.svg.addEventListener("pointermove", (event) => hover(one, event));
    one.svg.addEventListener("pointerdown", (event) => hover(one, event));
    one.svg.addEventListener("pointerleave", leave);
  });

  const list = document.getElementById("samples");
  if (list) {
    const rows = [...list.children];
    const [order, verdict, find, count, more] = ["order", "verdict", "find", "count", "more"].map((id) => document.getElementById(id));
    const number = (row, key) => row.dataset[key] === undefined ? NaN : Number(row.dataset[key]);
    const keys = {
      place: (row) => number(row, "place"),
      win: (row) => -number(row, "delta"),
      loss: (row) => number(row, "delta"),
      far: (row) => -Math.abs(number(row, "logratio")),
    };
    const page = 6;
    let shown = page;
    const update = () => {
      const key = (row) => { const value = keys[order.value](row); return Number.isNaN(value) ? Infinity : value; };
      const word = find.value.toLowerCase();
      const match = (row) => (!verdict || !verdict.value || row.dataset.verdict === verdict.value) && (!word || row.textContent.toLowerCase().includes(word));
      const sorted = rows.map((row) => [key(row), row]).sort((a, b) => a[0] === b[0] ? 0 : a[0] - b[0]).map((pair) => pair[1]);
      list.append(...sorted);
      const matching = sorted.filter(match);
      rows.forEach((row) => { row.hidden = true; });
      matching.slice(0, shown).forEach((row) => { row.hidden = false; });
      count.textContent = `${Math.min(shown, matching.length)} of ${matching.length} shown`;
      more.hidden = matching.length <= shown;
    };
    const restart = () => { shown = page; update(); };
    document.getElementById("controls").hidden = false;
    document.getElementById("controls").addEventListener("submit", (event) => event.preventDefault());
    [order, verdict].forEach((control) => control && control.addEventListener("change", restart));
    find.addEventListener("input", restart);
    more.addEventListener("click", () => { shown += 12; update(); });
    update();
  }

  addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((one) => { one.open = true; }));
})();
