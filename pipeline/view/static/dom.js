"use strict";
/* Elements are made of text alone, never of markup: what a model or a passage says cannot become a part of the page. */

const ExSearch = {};

ExSearch.h = function h(tag, attributes, ...children) {
  const element = ExSearch.h.inSvg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
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
    const text = value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });
    return /^-[0.,]*$/.test(text) ? text.slice(1) : text;
  },
  whole: (value) => ExSearch.format.number(value, 0),
  share: (value) => (value === null || value === undefined ? "–" : `${ExSearch.format.number(100 * value)} %`),
  span: (interval) => (interval ? interval.map((end) => ExSearch.format.number(end)).join(" to ") : "–"),
  words: (name) => name.replaceAll("_", " "),
  seconds(value) {
    if (value === null || value === undefined) return "–";
    const s = Math.round(value);
    if (s < 60) return `${s} s`;
    const minutes = Math.floor(s / 60);
    return minutes < 60 ? `${minutes} min ${s % 60} s` : `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
  },
  counts: (counted) => Object.entries(counted ?? {}).filter(([, count]) => count)
    .map(([name, count]) => `${ExSearch.format.words(name)} ${ExSearch.format.whole(count)}`).join(", "),
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

/* Names with values. */
ExSearch.facts = function facts(pairs) {
  const { h } = ExSearch;
  return h("dl", { class: "facts" }, pairs.filter(([, value]) => value !== null && value !== undefined && value !== "")
    .map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, String(value)))));
};

ExSearch.say = function say(text) {
  document.getElementById("said").textContent = text;
};
