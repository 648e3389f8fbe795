"use strict";
/* The questions of a source, a line each: sorted, filtered, searched; and against those of another source. */

ExSearch.questions = (() => {
  const { h, format, data } = ExSearch;
  const { number, share, whole, counts } = format;
  const PER_PAGE = 50, AT_ONCE = 4, REDRAW_MS = 300, LONGEST_SHARE = 0.1;

  /* A question: what stands in the columns of a page of lines, looked up when it is asked for. */
  class Line {
    constructor(there) { this.match = there; }
    at(chunk, row) {
      this.chunk = chunk;
      this.row = row;
      return this;
    }
    get there() { return this.match(this)?.em ?? null; }
    get where() { return `${this.chunk.part}/${Math.floor((this.chunk.first + this.row) / this.chunk.perPage)}`; }
  }
  for (const name of ["id", "question", "gold_answer", "answer", "hops", "type", "gold_passages", "trajectories", "em", "f1", "searches",
    "gold_recall", "stops", "log_likelihood", "effective_samples"]) {
    Object.defineProperty(Line.prototype, name, { get() { return this.chunk.columns[name][this.row]; } });
  }

  /* The lines of a source, by number: columns as they came, page by page, for there may be a million of them. `match(line)`:
     what a line is compared with. */
  class Lines {
    constructor(run, source, match = () => null) {
      Object.assign(this, { run, source, match, chunks: [], numbers: [], done: 0, parts: source.parts.length });
    }

    /* `cursor`: a line that is moved there, where none is kept. */
    at(number, cursor = new Line(this.match)) {
      const { linesPerPage } = this.run;
      return cursor.at(this.chunks[Math.floor(number / linesPerPage)], number % linesPerPage);
    }

    cursor() { return new Line(this.match); }

    /* A part that has gone meanwhile was of questions whose shard is complete now: it comes again with the next look. */
    async load(part, page) {
      try {
        return await data.load(`rows/${this.run.at}/${this.source.key}/${part}/${page}`, this.source.finished);
      } catch (error) {
        if (error.gone) return { pages: page, columns: {} };
        throw error;
      }
    }

    async readPart(place, onPage, stopped) {
      const { name } = this.source.parts[place];
      for (let page = 0, pages = 1; page < pages && !stopped(); page += 1) {
        const found = await this.load(name, page);
        pages = found.pages;
        if (found.columns.id) {
          const { perPage, linesPerPage } = this.run;
          this.chunks.push({ part: name, place, perPage, number: this.chunks.length, first: page * linesPerPage, columns: found.columns });
          this.fresh = true;
        }
        this.done += 1 / pages;
        onPage();
      }
    }

    /* In the order of the parts. A question whose shard was completed just now may be among those without a shard as well. */
    all() {
      if (!this.fresh) return this.numbers;
      this.fresh = false;
      const chunks = [...this.chunks].sort((a, b) => a.place - b.place || a.first - b.first);
      this.numbers = chunks.flatMap((chunk) => chunk.columns.id.map((_, row) => chunk.number * this.run.linesPerPage + row));
      if (!this.source.finished) this.numbers = [...this.byId().values()];
      return this.numbers;
    }

    byId() {
      const cursor = this.cursor();
      return new Map(this.numbers.map((number) => [this.at(number, cursor).id, number]));
    }

    /* `onPage()` after each page. */
    async read(onPage, stopped) {
      let next = 0;
      const work = async () => {
        while (next < this.parts && !stopped()) await this.readPart(next++, onPage, stopped);
      };
      await Promise.all(Array.from({ length: AT_ONCE }, work));
    }
  }

  const needed = (line, otherwise) => line.gold_passages ?? line.hops ?? otherwise;
  const KINDS = {
    all: ["all", () => true],
    failed: ["no trajectory is right", (line) => line.em === 0],
    mixed: ["some are right", (line) => line.em > 0 && line.em < 1],
    solved: ["all are right", (line) => line.em === 1],
    over: ["searched more than it takes", (line) => line.searches > needed(line, Infinity)],
    under: ["searched less than it takes", (line) => line.searches < needed(line, 0)],
    unfound: ["no gold passage was found", (line) => line.gold_recall === 0],
    broken: ["not all stopped by an answer", (line) => (line.stops.answered ?? 0) < line.trajectories],
    better: ["better than there", (line) => line.there !== null && line.em > line.there],
    worse: ["worse than there", (line) => line.there !== null && line.em < line.there],
    changed: ["changed", (line) => line.there !== null && line.em !== line.there],
  };
  const AGAINST = ["better", "worse", "changed"];
  const DEFAULTS = { text: "", kind: "all", hops: "", type: "", sort: "", down: "", page: "1", against: "" };

  /* `where`: PART/PAGE of its trajectories, if that is known: then nothing has to look for it. */
  const link = (at, key, id, where) => `#/run/${at}/question/${key}/${encodeURIComponent(id)}${where ? `?in=${where}` : ""}`;

  function columnsFor(run, source, many, against) {
    const verdict = (em) => (em === null ? "–" : em ? "right" : "wrong");
    return [
      { title: "question", key: "question", kind: "question",
        cell: (line) => h("a", { href: link(run.at, source.key, line.id, line.where), "data-focus": `question-${line.id}` }, line.question || line.id) },
      { title: "gold answer", key: "gold_answer", kind: "text", cell: (line) => line.gold_answer },
      many ? null : { title: "answer", key: "answer", kind: "text", cell: (line) => line.answer },
      { title: many ? "right" : "EM", key: "em", cell: (line) => (many ? share : verdict)(line.em) },
      against ? { title: "there", key: "there", cell: (line) => share(line.there) } : null,
      { title: "F1", key: "f1", cell: (line) => share(line.f1) },
      { title: "hops", key: "hops", cell: (line) => (line.hops ?? "–").toString() },
      { title: "type", key: "type", kind: "text", cell: (line) => line.type },
      { title: "searches", key: "searches", cell: (line) => number(line.searches, many ? 2 : 0) },
      { title: "gold found", key: "gold_recall", cell: (line) => share(line.gold_recall) },
      many ? { title: "log p(y | x)", key: "log_likelihood", cell: (line) => number(line.log_likelihood, 2) } : null,
      many ? { title: "effective samples", key: "effective_samples", cell: (line) => number(line.effective_samples, 2) } : null,
      { title: "stopped", key: null, kind: "text", cell: (line) => counts(line.stops) },
    ].filter(Boolean);
  }

  const collator = new Intl.Collator();
  const compare = (a, b) => {
    if (a === b) return 0;
    if (a === null || a === undefined) return 1;
    if (b === null || b === undefined) return -1;
    return typeof a === "string" ? collator.compare(a, b) : a - b;
  };

  async function page(at, key, parameters) {
    const [run, runs] = await Promise.all([data.run(at), data.runs()]);
    const source = run.sources.find((one) => one.key === key);
    if (!source) throw new Error(`this run has no trajectories of the name ${key}`);
    const others = runs.flatMap((other) => other.sources
      .filter((one) => one.split === source.split && !(other.at === at && one.key === key))
      .map((one) => ({ run: other, source: one, name: `${other.at}/${one.key}`,
        title: (runs.length > 1 ? `${other.name}: ` : "") + ExSearch.runs.titleOf(one) })));
    const many = source.kind.includes("samples");
    const settings = { ...DEFAULTS, ...Object.fromEntries(parameters) };
    if (!KINDS[settings.kind] || (AGAINST.includes(settings.kind) && !settings.against)) settings.kind = "all";
    const lines = new Lines(run, source, match);
    let there = null, closed = false, drawn = 0, took = 0, timer = null, comparison = 0;

    const results = h("div", {});
    const progress = h("span", { class: "dim" }), compared = h("span", { class: "dim" });
    const field = (label, element) => h("label", {}, label, element);
    const options = (pairs, chosen) => pairs.map(([value, text]) => h("option", { value, selected: value === chosen }, text));
    const text = h("input", { type: "search", name: "text", value: settings.text, size: 28 });
    const kind = h("select", { name: "kind" });
    const hops = h("select", { name: "hops" }), type = h("select", { name: "type" });
    const against = h("select", { name: "against" },
      options([["", "nothing"], ...others.map((other) => [other.name, other.title])], settings.against));
    const form = h("form", { class: "filters", role: "search", "aria-label": "Which questions", onsubmit: (event) => event.preventDefault() },
      field("part of question, answer or id", text), field("show", kind),
      field("hops", hops), field("type", type), field("compare with", against));

    function keep() {
      const changed = Object.entries(settings).filter(([name, value]) => value !== DEFAULTS[name]);
      const query = new URLSearchParams(changed).toString();
      history.replaceState(null, "", `#/run/${at}/questions/${key}${query ? `?${query}` : ""}`);
    }

    /* Whoever has a choice open is not disturbed: only other choices than there are replace them. */
    function fill(select, pairs, chosen) {
      const wanted = JSON.stringify(pairs);
      if (select.dataset.choices !== wanted) {
        select.replaceChildren(...options(pairs, chosen));
        select.dataset.choices = wanted;
      }
    }

    function fillChoices() {
      const usable = Object.entries(KINDS).filter(([name]) => there || !AGAINST.includes(name) || name === settings.kind);
      fill(kind, usable.map(([name, [told]]) => [name, told]), settings.kind);
      const values = (name) => [...new Set(lines.chunks.flatMap((chunk) => [...new Set(chunk.columns[name])]))]
        .filter((value) => value !== null && value !== "").sort(compare);
      const among = (name) => [["", "all"], ...values(name).map((value) => [String(value), String(value)])];
      fill(hops, among("hops"), settings.hops);
      fill(type, among("type"), settings.type);
    }

    /* The line of the same question there: of the same id, and, where they are known, of the same words. */
    function match(line) {
      const number = there?.ids.get(line.id);
      if (number === undefined) return null;
      const other = there.lines.at(number);
      return !line.question || !other.question || line.question === other.question ? other : null;
    }

    function chosen() {
      const wanted = settings.text.toLowerCase();
      const [, fits] = KINDS[settings.kind];
      const cursor = lines.cursor();
      const found = lines.all().filter((number) => {
        const line = lines.at(number, cursor);
        return fits(line)
          && (!settings.hops || String(line.hops) === settings.hops) && (!settings.type || line.type === settings.type)
          && (!wanted || [line.question, line.gold_answer, line.answer, line.id].some((value) => value.toLowerCase().includes(wanted)));
      });
      if (!settings.sort) return found;
      const keys = found.map((number) => lines.at(number, cursor)[settings.sort]);
      const order = Uint32Array.from(keys.keys()).sort((a, b) => (settings.down ? -1 : 1) * compare(keys[a], keys[b]) || a - b);
      return Array.from(order, (place) => found[place]);
    }

    function draw() {
      const begun = performance.now();
      const found = chosen(), of = lines.all().length;
      const pages = Math.max(1, Math.ceil(found.length / PER_PAGE));
      const current = Math.min(Math.max(1, Number(settings.page) || 1), pages);
      const columns = columnsFor(run, source, many, there !== null);
      const shown = found.slice((current - 1) * PER_PAGE, current * PER_PAGE).map((number) => lines.at(number));
      const focused = results.contains(document.activeElement) ? document.activeElement.dataset.focus : null;
      const cursor = lines.cursor();
      const scores = found.map((number) => lines.at(number, cursor).em).filter((em) => em !== null);
      const mean = scores.length ? scores.reduce((sum, em) => sum + em, 0) / scores.length : null;
      const both = there ? lines.all().filter((number) => match(lines.at(number, cursor))).length : 0;
      compared.textContent = there ? `, ${whole(both)} of ${whole(of)} are in both` : "";
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
      /* Not `disabled`, which would take the focus away. */
      const to = (page, title) => h("button", { class: "plain", type: "button", "aria-disabled": page < 1 || page > pages || page === current ? "true" : null,
        "data-focus": title, onclick: () => {
          if (page < 1 || page > pages || page === current) return;
          settings.page = String(page);
          again();
        } }, title);
      results.replaceChildren(
        h("p", {}, `${whole(found.length)} of ${whole(of)} questions`, mean === null ? "" : `, ${share(mean)} right`, compared, " ", progress),
        h("div", { class: "wide", tabindex: "0", role: "region", "aria-label": "Questions", "data-focus": "table" }, h("table", {},
          h("caption", { class: "hidden" }, "Questions; buttons in the head sort them"),
          h("thead", {}, h("tr", {}, head)),
          h("tbody", {}, shown.map((line) => h("tr", {}, columns.map((column, place) =>
            h(place ? "td" : "th", { class: column.kind, scope: place ? null : "row" }, column.cell(line)))))))),
        h("nav", { class: "paging", "aria-label": "Pages" }, to(1, "first"), to(current - 1, "previous"),
          `page ${whole(current)} of ${whole(pages)}`, to(current + 1, "next"), to(pages, "last")));
      if (focused) results.querySelector(`[data-focus="${CSS.escape(focused)}"]`)?.focus();
      ExSearch.questions.shown = { at, key, address: location.hash, beside: (id) => beside(found, id) };
      drawn = performance.now();
      took = drawn - begun;
      return found.length;
    }

    /* Where a question stands among those that are shown, and the ones around it; null if it is not among them. */
    function beside(found, id) {
      const cursor = lines.cursor();
      const place = found.findIndex((number) => lines.at(number, cursor).id === id);
      const [before, after] = [found[place - 1], found[place + 1]].map((number) => (number === undefined ? null : lines.at(number)));
      return place < 0 ? null : { place, of: found.length, before, after };
    }

    function again() {
      keep();
      ExSearch.say(`${whole(draw())} questions`);
    }

    async function compareWith() {
      const mine = ++comparison;
      there = null;
      const other = others.find((one) => one.name === settings.against);
      if (other) {
        progress.textContent = "reading what it is compared with";
        const found = new Lines(other.run, other.source);
        await found.read(() => {}, () => closed || mine !== comparison);
        if (mine !== comparison) return;
        found.all();
        there = { lines: found, ids: found.byId() };
        progress.textContent = "";
      } else if (AGAINST.includes(settings.kind)) {
        settings.kind = "all";
      }
      fillChoices();
    }

    const failed = (error) => { if (!closed) ExSearch.fail(error); };

    form.addEventListener("input", (event) => {
      settings[event.target.name] = event.target.value;
      settings.page = "1";
      if (event.target.name === "against") compareWith().then(again, failed);
      else again();
    });

    function begin() {
      fillChoices();
      draw();
      drawn = 0;
      const reading = lines.read(() => {
        if (closed) return;
        const more = source.finished ? "" : ExSearch.runs.goesOn(run) ? "(the sampling goes on)" : "(it was not finished)";
        const part = lines.done / lines.parts;
        progress.textContent = part < 1 - 1e-9 ? `(${share(part)} read)` : more;
        const redraw = () => { fillChoices(); draw(); };
        /* The more there is to draw the more seldom: a browser that only draws reads nothing. */
        const pause = Math.max(REDRAW_MS, took / LONGEST_SHARE);
        clearTimeout(timer);
        if (!drawn || performance.now() - drawn > pause) redraw();
        else timer = setTimeout(redraw, pause);
      }, () => closed);
      reading.then(async () => {
        if (settings.against) await compareWith();
        if (closed) return;
        clearTimeout(timer);
        fillChoices();
        draw();
        ExSearch.say(`${whole(lines.all().length)} questions are read`);
      }).catch(failed);
    }

    const title = ExSearch.runs.titleOf(source);
    return {
      trail: [[run.name, `#/run/${at}`], [title, `#/run/${at}/questions/${key}`]],
      title,
      content: [h("h1", {}, title), form, results],
      begin,
      isOld: source.finished || !ExSearch.runs.goesOn(run) ? null : async () => {
        const now = (await data.run(at)).sources.find((one) => one.key === key);
        return now && (now.finished || ExSearch.runs.rowsIn(now) !== ExSearch.runs.rowsIn(source));
      },
      close: () => { closed = true; clearTimeout(timer); },
    };
  }

  return { page, link, shown: null };
})();
