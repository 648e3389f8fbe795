"use strict";
/* Lines over iterations, with intervals: drawn for the eye, and the same figures as a table below for everybody else. */

ExSearch.charts = (() => {
  const { h, svg, format } = ExSearch;
  const WIDTH = 400, HEIGHT = 230, LEFT = 46, RIGHT = 14, TOP = 12, BOTTOM = 30, COLOURS = 8, SHIFT = 3;
  const DASHES = [null, "7 3", "2 3", "9 3 2 3", "5 5", "12 3", "1 5", "9 3 2 3 2 3"];

  const style = (place) => ({ class: `series series-${place % COLOURS}`, "stroke-dasharray": DASHES[place % DASHES.length] });

  function ticks(low, high) {
    const step = 10 ** Math.floor(Math.log10((high - low) / 3));
    const nice = [1, 2, 5, 10].map((factor) => factor * step).find((size) => (high - low) / size <= 5);
    const found = [];
    for (let at = Math.ceil(low / nice) * nice; at <= high + nice / 1e6; at += nice) found.push(at);
    return { found, digits: Math.max(0, -Math.floor(Math.log10(nice) + 1e-9)) };
  }

  /* asked: [{name, points: [{x, y, low, high}]}]; a series looks the same in every chart that is asked for it. */
  function lines(title, asked, { unit = "" } = {}) {
    const series = asked
      .map((one, place) => ({ ...one, place, points: one.points.filter((p) => p.y !== null && p.y !== undefined) }))
      .filter((one) => one.points.length);
    if (!series.length) return null;
    const points = series.flatMap((one) => one.points);
    const xs = points.map((p) => p.x), ys = points.flatMap((p) => [p.y, p.low ?? p.y, p.high ?? p.y]);
    const [left, right] = [Math.min(...xs), Math.max(...xs)];
    let [low, high] = [Math.min(...ys), Math.max(...ys)];
    if (low === high) [low, high] = [low - 1, high + 1];
    const margin = (high - low) * 0.06;
    [low, high] = [low - margin, high + margin];
    const x = (value) => LEFT + SHIFT + (left === right ? 0.5 : (value - left) / (right - left)) * (WIDTH - LEFT - RIGHT - 2 * SHIFT);
    const y = (value) => TOP + ((high - value) / (high - low)) * (HEIGHT - TOP - BOTTOM);
    const { found, digits } = ticks(low, high);
    const whole = [...new Set(xs)].sort((a, b) => a - b);
    const picture = svg(() => h("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, "aria-hidden": "true" },
      found.map((value) => [
        h("line", { class: "axis", x1: LEFT, x2: WIDTH - RIGHT, y1: y(value), y2: y(value) }),
        h("text", { x: LEFT - 6, y: y(value) + 4, "text-anchor": "end" }, format.number(value, digits)),
      ]),
      whole.map((value) => h("text", { x: x(value), y: HEIGHT - 8, "text-anchor": "middle" }, String(value))),
      series.map((one, rank) => {
        const shift = (rank - (series.length - 1) / 2) * SHIFT;
        return h("g", style(one.place),
          h("path", { d: one.points.map((p, i) => `${i ? "L" : "M"}${x(p.x) + shift} ${y(p.y)}`).join("") }),
          one.points.map((p) => [
            p.low !== undefined && p.low !== null
              ? h("path", { class: "interval", d: `M${x(p.x) + shift} ${y(p.low)}V${y(p.high)}` }) : null,
            h("circle", { cx: x(p.x) + shift, cy: y(p.y), r: 3 }),
          ]));
      })));
    const key = asked.length > 1
      ? h("ul", { class: "legend" }, series.map((one) => h("li", {},
        svg(() => h("svg", { viewBox: "0 0 24 8", "aria-hidden": "true" },
          h("g", style(one.place), h("path", { d: "M0 4H24" })))), one.name)))
      : null;
    const cell = (one, at) => {
      const p = one.points.find((point) => point.x === at);
      if (!p) return "–";
      return format.number(p.y, 2) + (p.low !== undefined && p.low !== null ? ` (${format.number(p.low, 2)} to ${format.number(p.high, 2)})` : "");
    };
    return h("figure", {},
      h("figcaption", {}, unit ? `${title}, ${unit}` : title), picture, key,
      h("details", {}, h("summary", {}, "as a table"),
        ExSearch.table(title, [["iteration", (at) => String(at)], ...series.map((one) => [one.name, (at) => cell(one, at)])], whole)));
  }

  return { lines };
})();
