"use strict";
/* Elements are made of text alone, never of markup: what a model or a passage says cannot become a part of the page. */

const ExSearch = {};

ExSearch.h = function h(tag, attributes, ...children) {
  const space = ["svg", "g", "path", "line", "circle", "text", "title", "rect"].includes(tag) && ExSearch.h.inSvg;
  const element = space ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes ?? {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== ""));
  return element;
};

/* What `make` builds with `h` are elements of SVG. */
ExSearch.svg = function svg(make) {
  ExSearch.h.inSvg = true;
  try { return make(); } finally { ExSearch.h.inSvg = false; }
};

ExSearch.format = {
  number(value, digits = 1) {
    if (value === null || value === undefined) return "–";
    return value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });
  },
  whole: (value) => ExSearch.format.number(value, 0),
  share: (value) => (value === null || value === undefined ? "–" : `${ExSearch.format.number(100 * value)} %`),
  span: (interval) => (interval ? interval.map((end) => ExSearch.format.number(end)).join(" to ") : "–"),
  seconds(value) {
    if (value === null || value === undefined) return "–";
    const s = Math.round(value);
    if (s < 60) return `${s} s`;
    const minutes = Math.floor(s / 60);
    return minutes < 60 ? `${minutes} min ${s % 60} s` : `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
  },
};

/* A table of texts. Columns: [title, cell(row), class]. */
ExSearch.table = function table(caption, columns, rows) {
  const { h } = ExSearch;
  return h("div", { class: "wide", tabindex: "0", role: "region", "aria-label": caption },
    h("table", {},
      h("caption", {}, caption),
      h("thead", {}, h("tr", {}, columns.map(([title, , kind]) => h("th", { scope: "col", class: kind }, title)))),
      h("tbody", {}, rows.map((row) => h("tr", {}, columns.map(([, cell, kind], place) =>
        place === 0 ? h("th", { scope: "row", class: kind ?? "text" }, cell(row)) : h("td", { class: kind }, cell(row))))))));
};

ExSearch.say = function say(text) {
  document.getElementById("said").textContent = text;
};
