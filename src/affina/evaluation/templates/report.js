"use strict";
for (const chart of document.querySelectorAll("svg[data-chart]")) {
  const plot = JSON.parse(chart.dataset.chart);
  const readout = chart.closest("figure").querySelector(".readout");
  const crosshair = chart.querySelector(".crosshair");
  const width = chart.viewBox.baseVal.width;
  const format = (value) => Math.abs(value) >= 1000 ? Math.round(value).toLocaleString("en")
    : Math.abs(value) >= 0.001 || value === 0 ? String(Number(value.toPrecision(4))) : value.toExponential(2);
  const nearest = (series, x) => {
    let best = -1;
    for (let i = 0; i < series.x.length; i++) {
      if (series.y[i] !== null && (best < 0 || Math.abs(series.x[i] - x) < Math.abs(series.x[best] - x))) best = i;
    }
    return best;
  };
  const show = (x) => {
    const first = plot.series[0];
    const at = nearest(first, x);
    if (at < 0) return;
    const place = plot.left + (first.x[at] - plot.low) / (plot.high - plot.low) * (plot.right - plot.left);
    crosshair.setAttribute("x1", place);
    crosshair.setAttribute("x2", place);
    crosshair.setAttribute("visibility", "visible");
    readout.textContent = plot.label + " " + format(first.x[at]) + plot.series.map((series) => {
      const i = nearest(series, first.x[at]);
      return i < 0 ? "" : " · " + (plot.series.length > 1 ? series.name + " " : "") + format(series.y[i]);
    }).join("");
  };
  const hide = () => { crosshair.setAttribute("visibility", "hidden"); readout.textContent = "\u00a0"; };
  chart.addEventListener("pointermove", (event) => {
    const box = chart.getBoundingClientRect();
    const pixel = (event.clientX - box.left) / box.width * width;
    show(plot.low + (pixel - plot.left) / (plot.right - plot.left) * (plot.high - plot.low));
  });
  chart.addEventListener("pointerleave", hide);
}
addEventListener("beforeprint", () => { for (const part of document.querySelectorAll("details")) part.open = true; });
