"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const colours = [0, 1, 2, 3, 4, 5, 6, 7].map(i => `var(--c${i})`);  // of style.css, which has them for both themes
const buttons = [...document.querySelectorAll(".axes button")];
let axis = buttons.some(b => `#${b.dataset.axis}` === location.hash) ? location.hash.slice(1) : "tokens";
const units = new Set(data.trainings.map(t => t.unit)), unit = units.size === 1 ? [...units][0] : "tokens";

const known = values => values.filter(v => v !== null && v !== undefined);
const label = (t, text) => data.trainings.length > 1 ? `${t.name}: ${text}` : text;

// Round numbers from low to high, about `wanted` of them.
function ticks(low, high, wanted) {
  const rough = (high - low) / wanted || 1, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map(m => m * power).find(s => s >= rough);
  const marks = [];
  for (let v = Math.ceil(low / step - 1e-9) * step; v <= high + step * 1e-9; v += step) marks.push(Math.abs(v) < step / 1e6 ? 0 : v);
  return marks;
}

// Half-way smoothing over a window of values, so that the trend shows through the noise of single batches.
function smooth(values) {
  const width = Math.max(1, Math.round(values.length / 60));
  return values.map((_, i) => {
    const part = known(values.slice(Math.max(0, i - width), i + width + 1));
    return part.length ? part.reduce((a, b) => a + b, 0) / part.length : null;
  });
}

// A chart in the element `id`: curves of { name, x, y, colour, dots, faint }, a legend, and the values under the pointer.
function chart(id, curves, { title, across, range, zero, write = short }) {
  const place = document.getElementById(id);
  if (!place) return;
  const legend = html("div", { class: "legend" }, ...(title ? [html("b", {}, title)] : []),
    curves.filter(c => c.name).map(c => html("span", {}, html("i", { class: c.dots ? "dots" : "", style: `border-color:${c.colour}` }), c.name)));
  place.replaceChildren(legend);
  const xs = curves.flatMap(c => known(c.x)), ys = curves.flatMap(c => known(c.y));
  if (!xs.length || !ys.length) { place.append(html("p", { class: "note" }, "Nothing is logged yet.")); return; }
  const W = Math.max(200, place.clientWidth), H = Math.max(90, place.clientHeight - legend.offsetHeight), top = 8, bottom = across ? 38 : 22;
  const x1 = Math.max(...xs) || 1, steps = ticks(0, x1, W < 500 ? 3 : 6);
  const right = Math.max(10, 4 * Math.max(...steps.map(v => short(v).length)));  // half of a label that stands at the end
  let [low, high] = range || [zero ? 0 : Math.min(...ys), Math.max(...ys)];
  if (!(high > low)) [low, high] = [low - (zero ? 0 : .5), low + .5];
  const marks = ticks(low, high, H < 220 ? 5 : 6), left = 14 + 7 * Math.max(...marks.map(v => write(v).length));
  const X = v => left + v / x1 * (W - left - right), Y = v => top + (high - v) / (high - low) * (H - top - bottom);
  const drawn = [];
  for (const v of marks) drawn.push(svg("path", { class: "grid", d: `M${left} ${Y(v)}H${W - right}` }), svg("text", { x: left - 7, y: Y(v) + 4, "text-anchor": "end" }, write(v)));
  for (const v of steps) drawn.push(svg("text", { x: X(v), y: H - bottom + 16, "text-anchor": "middle" }, short(v)));
  if (across) drawn.push(svg("text", { class: "across", x: (left + W - right) / 2, y: H - 5, "text-anchor": "middle" }, across));
  const inside = v => Y(Math.min(high, Math.max(low, v)));
  for (const c of curves) {
    let d = "", pen = "M";
    c.y.forEach((v, i) => {
      if (v === null || v === undefined || c.x[i] === null) { pen = "M"; return; }
      d += `${pen}${X(c.x[i]).toFixed(1)} ${inside(v).toFixed(1)}`;
      pen = "L";
    });
    drawn.push(svg("path", { class: `curve${c.dots ? " dots" : ""}`, d, style: `stroke:${c.colour}`, "stroke-width": c.faint ? 1 : 2, opacity: c.faint ? .25 : 1 }));
    if (c.dots) c.y.forEach((v, i) => { if (v !== null && v !== undefined) drawn.push(svg("circle", { cx: X(c.x[i]), cy: inside(v), r: 3, style: `fill:${c.colour}` })); });
    if (c.ring !== undefined && known([c.y[c.ring], c.x[c.ring]]).length === 2) drawn.push(svg("circle", { class: "kept", cx: X(c.x[c.ring]), cy: inside(c.y[c.ring]), r: 7, style: `fill:none;stroke:${c.colour}`, "stroke-width": 2 }));
  }
  const cursor = svg("path", { class: "cursor", d: "" });
  const picture = svg("svg", { width: W, height: H, viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": title || across || id }, drawn, cursor);
  const tip = html("div", { class: "tip", hidden: "" });
  place.append(picture, tip);
  picture.addEventListener("pointerleave", () => { tip.hidden = true; cursor.setAttribute("d", ""); });
  picture.addEventListener("pointermove", event => {
    const at = (event.clientX - picture.getBoundingClientRect().left - left) / (W - left - right) * x1;
    const near = curves.filter(c => c.name || curves.length === 1).map(c => {
      let best = -1;
      c.x.forEach((x, i) => { if (x !== null && known([c.y[i]]).length && (best < 0 || Math.abs(x - at) < Math.abs(c.x[best] - at))) best = i; });
      return best < 0 ? null : { name: c.name, colour: c.colour, x: c.x[best], y: c.y[best] };
    }).filter(Boolean);
    if (!near.length) return;
    const x = near[0].x, exact = v => write === short ? figure(v) : write(v);
    cursor.setAttribute("d", `M${X(x)} ${top}V${H - bottom}`);
    tip.replaceChildren(html("b", {}, `${figure(x)} ${across || ""}`), ...near.map(n => html("div", {}, html("i", { style: `border-color:${n.colour}` }), `${n.name || ""} ${exact(n.y)}`)));
    tip.hidden = false;
    tip.style.left = `${Math.max(0, Math.min(W - tip.offsetWidth - 4, X(x) + 12))}px`;
  });
}

// All curves of a training have its colour; those of validation text are dotted.
function losses() {
  const across = { tokens: unit, flops: "FLOPs", seconds: "seconds of training" }[axis];
  data.plots.forEach((plot, n) => {
    const curves = [], settled = [];
    plot.curves.forEach(({ training, part, column }) => {
      const t = data.trainings[training], colour = colours[training % colours.length], x = t[part][axis], y = t[part][column];
      if (part === "step") {
        const trend = smooth(y);
        settled.push(...known(trend.slice(Math.floor(y.length / 20))));
        curves.push({ x, y, colour, faint: true }, { x, y: trend, colour, name: label(t, "training") });
      } else {
        settled.push(...known(y.slice(Math.floor(y.length / 20))));
        curves.push({ x, y, colour, dots: true, ring: t.kept, name: label(t, "validation") });
      }
    });
    const high = Math.max(...settled), low = Math.min(...settled), edge = .05 * (high - low) || .1;
    chart(`loss-${n}`, curves, { title: plot.unit, across, range: settled.length ? [low - edge, high + edge] : null });
  });
}

function trainings() {
  losses();
  const titles = { rate: "learning rate", norm: "gradient norm", speed: `${unit} a second`, mfu: "share of the matrix rate" };
  const columns = { rate: "lr", norm: "grad_norm", speed: "tokens_per_second", mfu: "mfu" };
  Object.keys(columns).forEach(id => {
    const curves = data.trainings.map((t, i) => ({
      x: t.step[axis], y: id === "rate" ? t.step.lr : smooth(t.step[columns[id]]), name: data.trainings.length > 1 ? t.name : "", colour: colours[i % colours.length],
    }));
    const share = v => `${+(100 * v).toPrecision(3)}%`;
    chart(id, curves, { title: titles[id], zero: true, ...(id === "mfu" ? { write: share } : {}) });
  });
}

function choose(name) {
  axis = name;
  buttons.forEach(b => b.classList.toggle("on", b.dataset.axis === axis));
  trainings();
}
buttons.forEach(button => button.addEventListener("click", () => { location.hash = button.dataset.axis; choose(button.dataset.axis); }));
// The documents of a corpus, one at a time; without this all of them are shown.
document.querySelectorAll(".browse").forEach(browser => {
  const list = browser.querySelector("select"), count = browser.querySelector("output"), all = [...browser.querySelectorAll("article")];
  let place = 0;
  const show = () => {
    const group = all.filter(each => each.dataset.group === list.value);
    place = (place + group.length) % group.length;
    all.forEach(each => { each.hidden = each !== group[place]; });
    count.textContent = `${place + 1} of ${group.length}`;
  };
  list.addEventListener("change", () => { place = 0; show(); });
  browser.querySelectorAll("button").forEach(button => button.addEventListener("click", () => { place += +button.value; show(); }));
  show();
});
let width = 0;
addEventListener("resize", () => { if (innerWidth !== width) { width = innerWidth; trainings(); } });
if (data.trainings.length) choose(axis);
if (data.reload) setTimeout(() => location.reload(), 1000 * data.reload);  // of a run that is still going
