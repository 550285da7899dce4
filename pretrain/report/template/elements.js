"use strict";
// The one place that makes elements: texts are text nodes and values attributes, so that none is read as markup.
function element(space, name, attributes, ...children) {
  const made = document.createElementNS(space, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children.flat());
  return made;
}
const html = (name, attributes, ...children) => element("http://www.w3.org/1999/xhtml", name, attributes, ...children);
const svg = (name, attributes, ...children) => element("http://www.w3.org/2000/svg", name, attributes, ...children);

// Numbers as `pretrain/core/quick/quantities.py` writes them, which says how.
const prefixes = [[1e18, "E"], [1e15, "P"], [1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"], [0, ""]];
const plain = (v, digits) => Math.abs(v) >= 10 ** (digits - 1) ? Math.round(v).toLocaleString("en") : String(+v.toPrecision(digits));
function short(v, digits = 3) {
  const near = +v.toPrecision(digits), [power, letter] = prefixes.find(([power]) => Math.abs(near) >= power);
  return `${plain(near / (power || 1), digits)} ${letter}`.trim();
}
function figure(v, digits = 4) {
  const near = +v.toPrecision(digits);
  if (Math.abs(near) >= 1e7) return short(v, digits);
  return Number.isInteger(v) ? v.toLocaleString("en") : plain(near, digits);
}
