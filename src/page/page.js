// The read-out under the pointer; arrow keys move it where there is no pointer.
"use strict";
const format = {
  plain: v => v.toPrecision(5),
  rate: v => v.toExponential(3),
  speed: v => Math.round(v).toLocaleString("en") + " tok/s",
  bytes: v => (v / 2 ** 20).toFixed(0) + " MiB",
};

const place = {
  step: x => "step " + x.toLocaleString("en"),
  tokens: x => Math.round(x).toLocaleString("en") + " tokens",
  seconds: x => x.toPrecision(4) + " s of training steps",
};

function nearest(xs, x) {
  let low = 0, high = xs.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (xs[middle] < x) low = middle + 1; else high = middle;
  }
  return low > 0 && x - xs[low - 1] < xs[low] - x ? low - 1 : low;
}

for (const chart of JSON.parse(document.getElementById("data").textContent)) {
  const plot = document.getElementById(chart.id);
  const lines = chart.lines.filter(line => line.x.length > 0);
  if (!plot || lines.length === 0) continue;
  const steps = [...new Set(lines.flatMap(line => line.x))].sort((a, b) => a - b);
  const cursor = document.createElement("div");
  const readout = document.createElement("div");
  cursor.className = "cursor";
  readout.className = "readout";
  let at = steps.length - 1;

  function show(index) {
    at = Math.max(0, Math.min(steps.length - 1, index));
    const step = steps[at];
    readout.replaceChildren(place[chart.x](step));
    for (const line of lines) {
      // Without a name: one of several lines around a mean.
      if (lines.length > 1 && !line.name) continue;
      const i = nearest(line.x, step);
      const row = document.createElement("div");
      row.className = line.class;
      row.textContent = (lines.length > 1 ? line.name + " " : "") + format[chart.unit](line.y[i]);
      // Evaluations are far apart: the nearest one, and where it was.
      if (line.class === "val" && line.x[i] !== step) row.textContent += ` at step ${line.x[i].toLocaleString("en")}`;
      readout.append(row);
    }
    plot.append(cursor, readout);
    const share = step / chart.last;
    cursor.style.left = share * 100 + "%";
    readout.style.left = share < 0.5 ? `calc(${share * 100}% + 8px)` : "auto";
    readout.style.right = share < 0.5 ? "auto" : `calc(${(1 - share) * 100}% + 8px)`;
  }
  function hide() { cursor.remove(); readout.remove(); }

  plot.addEventListener("pointermove", event => {
    const box = plot.getBoundingClientRect();
    show(nearest(steps, (event.clientX - box.left) / box.width * chart.last));
  });
  plot.addEventListener("pointerleave", hide);
  plot.addEventListener("focus", () => { if (plot.matches(":focus-visible")) show(at); });
  plot.addEventListener("blur", hide);
  plot.addEventListener("keydown", event => {
    const move = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity }[event.key];
    if (move === undefined) return;
    event.preventDefault();
    show(at + move);
  });
}

// Paper shows everything.
addEventListener("beforeprint", () => {
  for (const folded of document.querySelectorAll("details")) folded.open = true;
});
