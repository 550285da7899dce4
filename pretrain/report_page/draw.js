"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const colours = ["#0b8296", "#e8590c", "#7950f2", "#2f9e44", "#e64980", "#b08800", "#4c6ef5", "#a0522d"];
const style = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
let axis = "tokens";
const units = new Set(data.trainings.map(t => t.unit)), unit = units.size === 1 ? [...units][0] : "tokens";

function layout(more) {
  const line = { gridcolor: style("--line"), zeroline: false, automargin: true };
  return Object.assign({
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", margin: { l: 8, r: 8, t: 28, b: 8 },
    font: { color: style("--soft"), family: "system-ui, sans-serif", size: 12 }, hovermode: "x unified",
    hoverlabel: { bgcolor: style("--card"), bordercolor: style("--line"), font: { color: style("--ink") } },
    legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0 },
  }, more, { xaxis: Object.assign({}, line, more.xaxis), yaxis: Object.assign({}, line, more.yaxis) });
}

const draw = (id, traces, more) => {
  if (document.getElementById(id)) Plotly.react(id, traces, layout(more), { responsive: true, displayModeBar: false });
};

// Half-way smoothing over a window of values, so that the trend shows through the noise of single batches.
function smooth(values) {
  const width = Math.max(1, Math.round(values.length / 60));
  return values.map((_, i) => {
    const part = values.slice(Math.max(0, i - width), i + width + 1).filter(v => v !== null);
    return part.length ? part.reduce((a, b) => a + b, 0) / part.length : null;
  });
}

const known = values => values.filter(v => v !== null);

// All curves of a training have its colour; held-out ones are dotted.
function losses() {
  const x = { title: { text: { tokens: unit, flops: "FLOPs", seconds: "seconds of training" }[axis] }, rangemode: "tozero" };
  data.plots.forEach((plot, number) => {
    const traces = [], settled = [];
    plot.curves.forEach(({ training, part, column }) => {
      const t = data.trainings[training], colour = colours[training % colours.length], y = t[part][column];
      const curve = { x: t[part][axis], name: label(t, part === "step" ? "training" : "held-out") };
      if (part === "step") {
        const trend = smooth(y);
        settled.push(...known(trend.slice(Math.floor(y.length / 50))));
        traces.push(Object.assign({}, curve, { y, mode: "lines", line: { color: colour, width: 1 }, opacity: .25, hoverinfo: "skip", showlegend: false }));
        traces.push(Object.assign(curve, { y: trend, mode: "lines", line: { color: colour, width: 2 } }));
      } else {
        settled.push(...known(y));
        traces.push(Object.assign(curve, { y, mode: "lines+markers", line: { color: colour, width: 2, dash: "dot" } }));
      }
    });
    const top = Math.max(...settled), low = Math.min(...settled), edge = .05 * (top - low) || .1;
    draw(`loss-${number}`, traces, { xaxis: x, yaxis: { title: { text: plot.unit }, range: [low - edge, top + edge] } });
  });
}

const label = (t, text) => data.trainings.length > 1 ? `${t.name}: ${text}` : text;

function trainings() {
  losses();
  const titles = { rate: "learning rate", norm: "gradient norm", speed: `${unit} a second`, mfu: "share of the matrix rate" };
  const columns = { rate: "lr", norm: "grad_norm", speed: "tokens_per_second", mfu: "mfu" };
  Object.keys(columns).forEach(id => {
    const traces = data.trainings.map((t, i) => ({
      x: t.step[axis], y: t.step[columns[id]], name: t.name, mode: "lines", line: { color: colours[i % colours.length], width: id === "rate" ? 2 : 1 },
    }));
    draw(id, traces, {
      title: { text: titles[id], font: { size: 13 }, x: 0, xanchor: "left" }, showlegend: data.trainings.length > 1,
      legend: { orientation: "h", y: -.18, x: 0 }, xaxis: { rangemode: "tozero" }, yaxis: { rangemode: "tozero", tickformat: id === "mfu" ? ".0%" : "" },
    });
  });
}

// Bars lie, so that names and numbers have room on a phone; a row for all text, then one for each domain.
function bars() {
  const shorten = name => name.length > 16 ? name.slice(0, 15) + "…" : name;
  data.bars.forEach((chart, number) => {
    const rows = ["all text", ...chart.domains.map(shorten)];
    const greys = ["#adb5bd", "#868e96", "#ced4da"], models = chart.models.length;
    const traces = [...chart.models, ...chart.tools].map((series, i) => {
      const x = [series.all, ...series.values], ends = series.interval;
      return {
        type: "bar", orientation: "h", name: series.name, x, y: rows.map((_, k) => k), hoverinfo: "skip", cliponaxis: false,
        marker: { color: i < models ? colours[i % colours.length] : greys[(i - models) % greys.length] },
        text: x.map(v => v === null ? "" : v.toFixed(2)), textposition: ends ? "inside" : "outside", insidetextanchor: "start", textangle: 0, textfont: { size: 12 }, constraintext: "none",
        error_x: ends ? { type: "data", symmetric: false, array: [ends[1] - series.all], arrayminus: [series.all - ends[0]], color: style("--ink"), thickness: 1.2, width: 3 } : undefined,
      };
    });
    const top = Math.max(...traces.flatMap(t => known(t.x)), ...chart.models.map(m => m.interval ? m.interval[1] : 0));
    draw(`bars-${number}`, traces, {
      barmode: "group", bargap: .3, hovermode: false, legend: { orientation: "h", y: 1, yanchor: "bottom", x: 0, traceorder: "normal" },
      xaxis: { title: { text: "bits per byte" }, range: [0, top * 1.15] },
      yaxis: { autorange: "reversed", tickvals: rows.map((_, k) => k), ticktext: rows, showgrid: false },
    });
  });
}

function all() { if (data.trainings.length) trainings(); bars(); }
document.querySelectorAll(".axes button").forEach(button => button.addEventListener("click", () => {
  document.querySelectorAll(".axes button").forEach(b => b.classList.toggle("on", b === button));
  axis = button.dataset.axis;
  trainings();
}));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", all);
all();
