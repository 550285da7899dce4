"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const colours = ["#0b7285", "#e8590c", "#5f3dc4", "#2b8a3e", "#c2255c"];
const style = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
let axis = "tokens";

function layout(more) {
  const line = { gridcolor: style("--line"), zeroline: false, automargin: true };
  return Object.assign({
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", margin: { l: 8, r: 8, t: 28, b: 8 },
    font: { color: style("--soft"), family: "system-ui, sans-serif", size: 12 }, hovermode: "x unified",
    hoverlabel: { bgcolor: style("--card"), bordercolor: style("--line"), font: { color: style("--ink") } },
    legend: { orientation: "h", y: 1.12, x: 0 },
  }, more, { xaxis: Object.assign({}, line, more.xaxis), yaxis: Object.assign({}, line, more.yaxis) },
  more.yaxis2 ? { yaxis2: Object.assign({}, line, { overlaying: "y", side: "right", showgrid: false }, more.yaxis2) } : {});
}

const draw = (id, traces, more) => {
  if (document.getElementById(id)) Plotly.react(id, traces, layout(more), { responsive: true, displayModeBar: false });
};

// Half-way smoothing over a window of values, so that the trend shows through the noise of single batches.
function smooth(values) {
  const width = Math.max(1, Math.round(values.length / 60));
  return values.map((_, i) => {
    const part = values.slice(Math.max(0, i - width), i + width + 1).filter(v => v !== null);
    return part.reduce((a, b) => a + b, 0) / part.length;
  });
}

function trainings() {
  const several = data.trainings.length > 1, label = (t, text) => several ? `${t.name}: ${text}` : text;
  const loss = [], rate = [], speed = [];
  data.trainings.forEach((t, i) => {
    const colour = colours[i % colours.length], x = t.step[axis];
    const inBits = t.step.bits_per_byte.some(v => v !== null) && t.evaluation.bits_per_byte.some(v => v !== null);
    const what = inBits ? "bits_per_byte" : "loss";
    loss.push({ x, y: t.step[what], name: label(t, "batch"), mode: "lines", line: { color: colour, width: 1 }, opacity: .25, hoverinfo: "skip", showlegend: false });
    loss.push({ x, y: smooth(t.step[what]), name: label(t, "training"), mode: "lines", line: { color: colour, width: 2 } });
    if (t.evaluation[what].some(v => v !== null)) {
      loss.push({ x: t.evaluation[axis], y: t.evaluation[what], name: label(t, "held-out"), mode: "lines+markers", line: { color: colours[(i + 1) % colours.length], width: 2, dash: "dot" } });
    }
    rate.push({ x, y: t.step.lr, name: label(t, "learning rate"), line: { color: colour } });
    rate.push({ x, y: t.step.grad_norm, name: label(t, "gradient norm"), yaxis: "y2", opacity: .6, line: { color: colours[(i + 1) % colours.length], width: 1 } });
    speed.push({ x, y: t.step.tokens_per_second, name: label(t, "tokens a second"), line: { color: colour, width: 1 } });
  });
  const inBits = data.trainings.some(t => t.evaluation.bits_per_byte.some(v => v !== null));
  const settled = data.trainings.flatMap(t => smooth((inBits ? t.step.bits_per_byte : t.step.loss)).slice(Math.floor(t.step.loss.length / 50))).filter(v => v !== null);
  const top = Math.max(...settled), low = Math.min(...settled, ...data.trainings.flatMap(t => t.evaluation[inBits ? "bits_per_byte" : "loss"]).filter(v => v !== null));
  const title = { tokens: "tokens", flops: "FLOPs", seconds: "seconds of training" }[axis];
  const x = { title: { text: title }, rangemode: "tozero" };
  draw("loss", loss, { xaxis: x, yaxis: { title: { text: inBits ? "bits per byte" : "loss (nats a token)" }, range: [low - .05 * (top - low), top + .05 * (top - low)] } });
  draw("rate", rate, { xaxis: x, yaxis: { rangemode: "tozero" }, yaxis2: { rangemode: "tozero" } });
  draw("speed", speed, { xaxis: x, yaxis: { rangemode: "tozero" }, showlegend: true });
}

function bars() {
  data.bars.slice(-1).forEach(b => {
    const names = Object.keys(b.series);
    const traces = names.map((name, i) => ({
      type: "bar", name, x: b.domains, y: b.series[name], marker: { color: i ? ["#adb5bd", "#868e96"][(i - 1) % 2] : colours[0] },
      text: b.series[name].map(v => v === null ? "" : v.toFixed(2)), textposition: "inside", insidetextanchor: "middle", textangle: 0, hoverinfo: "skip",
      error_y: i === 0 && b.interval ? { type: "data", symmetric: false, array: [b.interval[1] - b.series[name][0]], arrayminus: [b.series[name][0] - b.interval[0]], color: style("--soft") } : undefined,
    }));
    draw("bars", traces, { barmode: "group", hovermode: false, yaxis: { title: { text: "bits per byte" } } });
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
