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
