"use strict";
/* The questions of a source, a line each: sorted, filtered, searched; and against those of another source. */

ExSearch.questions = (() => {
  const { h, format, data } = ExSearch;
  const { number, share, whole } = format;
  const PER_PAGE = 50, AT_ONCE = 4, REDRAW_MS = 300;

  /* All lines of a source as they come; `onPart(soFar, done, all)`, where `soFar()` gives those that are there. */
  async function readAll(at, source, onPart, stopped = () => false) {
    const lines = new Array(source.parts.length).fill([]);
    let next = 0, done = 0;
    async function work() {
      while (next < source.parts.length && !stopped()) {
        const place = next++;
        const columns = await data.load(`rows/${at}/${source.key}/${source.parts[place].name}`);
        const names = Object.keys(columns);
        lines[place] = (columns.id ?? []).map((_, i) => Object.fromEntries(names.map((name) => [name, columns[name][i]])));
        done += 1;
        onPart(all, done, source.parts.length);
      }
    }
    /* A question whose shard was completed just now may be among those without a shard as well. */
    function all() {
      return [...new Map(lines.flat().map((line) => [line.id, line])).values()];
    }
    await Promise.all(Array.from({ length: AT_ONCE }, work));
    return all();
  }

  const KINDS = {
    all: ["all", () => true],
    failed: ["no trajectory is right", (line) => line.em === 0],
    mixed: ["some are right", (line) => line.em > 0 && line.em < 1],
    solved: ["all are right", (line) => line.em === 1],
    over: ["searched more than it takes", (line) => line.searches > (line.gold_passages ?? line.hops ?? Infinity)],
    under: ["searched less than it takes", (line) => line.searches < (line.gold_passages ?? line.hops ?? 0)],
    unfound: ["no gold passage was found", (line) => line.gold_recall === 0],
    broken: ["not all stopped by an answer", (line) => (line.stops.answered ?? 0) < line.trajectories],
    better: ["better than there", (line, other) => other && line.em > other.em],
    worse: ["worse than there", (line, other) => other && line.em < other.em],
    changed: ["changed", (line, other) => other && line.em !== other.em],
  };
  const AGAINST = ["better", "worse", "changed"];

  const stops = (line) => Object.entries(line.stops).map(([name, count]) => `${name.replaceAll("_", " ")}${count > 1 ? ` ${count}` : ""}`).join(", ");
  const link = (at, key, line) => `#/run/${at}/question/${key}/${encodeURIComponent(line.id)}`;

  function columnsFor(at, source, many, against) {
    return [
      { title: "question", key: "question", kind: "question", cell: (line) => h("a", { href: link(at, source.key, line) }, line.question || line.id) },
      { title: "gold answer", key: "gold_answer", kind: "text", cell: (line) => line.gold_answer },
      many ? null : { title: "answer", key: "answer", kind: "text", cell: (line) => line.answer },
      { title: many ? "right" : "EM", key: "em", cell: (line) => (many ? share(line.em) : line.em === null ? "–" : line.em ? "right" : "wrong") },
      against ? { title: "there", key: "there", cell: (line) => share(line.there) } : null,
      { title: "F1", key: "f1", cell: (line) => share(line.f1) },
      { title: "hops", key: "hops", cell: (line) => (line.hops ?? "–").toString() },
      { title: "type", key: "type", kind: "text", cell: (line) => line.type },
      { title: "searches", key: "searches", cell: (line) => number(line.searches, many ? 2 : 0) },
      { title: "gold found", key: "gold_recall", cell: (line) => share(line.gold_recall) },
      many ? { title: "log p(y | x)", key: "log_likelihood", cell: (line) => number(line.log_likelihood, 2) } : null,
      many ? { title: "effective samples", key: "effective_samples", cell: (line) => number(line.effective_samples, 2) } : null,
      { title: "stopped", key: null, kind: "text", cell: stops },
    ].filter(Boolean);
  }

  const compare = (a, b) => {
    if (a === b) return 0;
    if (a === null || a === undefined) return 1;
    if (b === null || b === undefined) return -1;
    return typeof a === "string" ? a.localeCompare(b) : a - b;
  };

  async function page(at, key, parameters) {
    const [list, run] = await Promise.all([data.load("runs"), data.load(`run/${at}`, { fresh: !data.exported })]);
    const source = run.sources.find((one) => one.key === key);
    if (!source) throw new Error(`this run has no trajectories of the name ${key}`);
    const others = (await Promise.all(list.runs.map(async (one, number) => (await data.load(`run/${number}`)).sources
      .filter((other) => !(number === at && other.key === key))
      .map((other) => ({ at: number, source: other, title: (list.runs.length > 1 ? `${one.name}: ` : "") + ExSearch.runs.titleOf(other) }))))).flat();
    const many = source.kind.includes("samples");
    const settings = { text: "", kind: "all", hops: "", type: "", sort: "", down: "", page: "1", against: "", ...Object.fromEntries(parameters) };
    let lines = [], there = null, closed = false, drawn = 0, timer = null;

    const results = h("div", {});
    const progress = h("span", { class: "dim" });
    const field = (name, label, element) => h("label", {}, label, element);
    const options = (pairs, chosen) => pairs.map(([value, text]) => h("option", { value, selected: value === chosen }, text));
    const text = h("input", { type: "search", name: "text", value: settings.text, size: 28 });
    const kind = h("select", { name: "kind" });
    const hops = h("select", { name: "hops" }), type = h("select", { name: "type" });
    const against = h("select", { name: "against" },
      options([["", "nothing"], ...others.map((other) => [`${other.at}/${other.source.key}`, other.title])], settings.against));
    const form = h("form", { class: "filters", role: "search", onsubmit: (event) => event.preventDefault() },
      field("text", "words of question, answer or id", text), field("kind", "show", kind),
      field("hops", "hops", hops), field("type", "type", type), field("against", "compare with", against));

    function keep() {
      const changed = Object.entries(settings).filter(([name, value]) => value && !(name === "kind" && value === "all") && !(name === "page" && value === "1"));
      const query = new URLSearchParams(changed).toString();
      history.replaceState(null, "", `#/run/${at}/questions/${key}${query ? `?${query}` : ""}`);
    }

    function fillChoices() {
      const usable = Object.entries(KINDS).filter(([name]) => there || !AGAINST.includes(name));
      kind.replaceChildren(...options(usable.map(([name, [words]]) => [name, words]), settings.kind));
      const values = (name) => [...new Set(lines.map((line) => line[name]).filter((value) => value !== null && value !== ""))].sort(compare);
      hops.replaceChildren(...options([["", "all"], ...values("hops").map((value) => [String(value), String(value)])], settings.hops));
      type.replaceChildren(...options([["", "all"], ...values("type").map((value) => [value, value])], settings.type));
    }

    function chosen() {
      const words = settings.text.toLowerCase();
      const [, fits] = KINDS[settings.kind] ?? KINDS.all;
      const found = lines.filter((line) => {
        line.there = there?.get(line.id)?.em ?? null;
        return fits(line, there?.get(line.id)) && (!settings.hops || String(line.hops) === settings.hops) && (!settings.type || line.type === settings.type)
          && (!words || [line.question, line.gold_answer, line.answer, line.id].some((value) => value.toLowerCase().includes(words)));
      });
      if (settings.sort) found.sort((a, b) => (settings.down ? -1 : 1) * compare(a[settings.sort], b[settings.sort]));
      return found;
    }

    function draw() {
      drawn = performance.now();
      const found = chosen();
      const pages = Math.max(1, Math.ceil(found.length / PER_PAGE));
      const current = Math.min(Math.max(1, Number(settings.page) || 1), pages);
      const columns = columnsFor(at, source, many, there !== null);
      const shown = found.slice((current - 1) * PER_PAGE, current * PER_PAGE);
      const focused = results.contains(document.activeElement) ? document.activeElement.dataset.focus : null;
      const mean = found.length ? found.reduce((sum, line) => sum + (line.em ?? 0), 0) / found.length : null;
      const head = columns.map((column) => {
        const sorted = settings.sort === column.key && column.key;
        return h("th", { scope: "col", class: column.kind ? "text" : null, "aria-sort": sorted ? (settings.down ? "descending" : "ascending") : null },
          column.key
            ? h("button", { type: "button", "data-focus": `sort-${column.key}`, onclick: () => {
              settings.down = settings.sort === column.key && !settings.down ? "1" : "";
              settings.sort = column.key;
              settings.page = "1";
              again();
            } }, column.title)
            : column.title);
      });
      const to = (page, title, label) => h("button", { class: "plain", type: "button", disabled: page < 1 || page > pages || page === current, "data-focus": label,
        onclick: () => { settings.page = String(page); again(); } }, title);
      results.replaceChildren(
        h("p", {}, `${whole(found.length)} of ${whole(lines.length)} questions`, found.length ? `, ${share(mean)} right` : "", " ", progress),
        h("div", { class: "wide", tabindex: "0", role: "region", "aria-label": "Questions" }, h("table", {},
          h("caption", { class: "hidden" }, "Questions; buttons in the head sort them"),
          h("thead", {}, h("tr", {}, head)),
          h("tbody", {}, shown.map((line) => h("tr", {}, columns.map((column) => h("td", { class: column.kind }, column.cell(line)))))))),
        h("nav", { class: "paging", "aria-label": "Pages" }, to(1, "first", "first"), to(current - 1, "previous", "previous"),
          `page ${whole(current)} of ${whole(pages)}`, to(current + 1, "next", "next"), to(pages, "last", "last")));
      if (focused) results.querySelector(`[data-focus="${focused}"]`)?.focus();
      ExSearch.questions.shown = { at, key, ids: found.map((line) => line.id) };
    }

    function again() {
      keep();
      draw();
    }

    async function compareWith() {
      there = null;
      const other = others.find((one) => `${one.at}/${one.source.key}` === settings.against);
      if (other) {
        progress.textContent = "reading what it is compared with";
        const found = await readAll(other.at, other.source, () => {}, () => closed);
        there = new Map(found.map((line) => [line.id, line]));
        progress.textContent = "";
      } else if (AGAINST.includes(settings.kind)) {
        settings.kind = "all";
      }
      fillChoices();
    }

    form.addEventListener("input", (event) => {
      settings[event.target.name] = event.target.value;
      settings.page = "1";
      if (event.target.name === "against") compareWith().then(again, (error) => ExSearch.fail(error));
      else again();
    });

    function begin() {
      fillChoices();
      draw();
      const reading = readAll(at, source, (found, done, all) => {
        progress.textContent = done < all ? `(${whole(done)} of ${whole(all)} parts read)` : source.finished ? "" : "(the sampling goes on)";
        const redraw = () => { lines = found(); fillChoices(); draw(); };
        clearTimeout(timer);
        if (done === 1 || performance.now() - drawn > REDRAW_MS) redraw();
        else timer = setTimeout(redraw, REDRAW_MS);
      }, () => closed);
      reading.then((found) => { lines = found; return settings.against ? compareWith() : null; }).then(() => {
        if (closed) return;
        clearTimeout(timer);
        fillChoices();
        draw();
        ExSearch.say(`${whole(lines.length)} questions are read`);
      }).catch((error) => { if (!closed) ExSearch.fail(error); });
    }

    const title = ExSearch.runs.titleOf(source);
    return {
      trail: [[list.runs[at].name, `#/run/${at}`], [title, `#/run/${at}/questions/${key}`]],
      title,
      content: [h("h1", {}, title), form, results],
      begin,
      close: () => { closed = true; clearTimeout(timer); },
    };
  }

  return { page, link, shown: null };
})();
