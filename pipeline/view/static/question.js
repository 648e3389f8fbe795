"use strict";
/* One question: its trajectories side by side, turn by turn. */

ExSearch.question = (() => {
  const { h, format, data, facts } = ExSearch;
  const { number, whole, share, words } = format;
  const LONGEST_TITLE = 300;

  /* Where questions are whose id may be this one, {where, words} of each: its checksum is the same. */
  async function placesIn(run, source, id) {
    const mark = data.checksum(id);
    const { parts } = await data.load(`ids/${run.at}/${source.key}/${source.spread}/${mark % source.spread}`, source.finished);
    return Object.entries(parts).flatMap(([part, found]) => found.ids.flatMap((other, at) =>
      (other === mark ? [{ where: `${part}/${Math.floor(found.places[at] / run.perPage)}`, words: found.words[at] }] : [])));
  }

  /* {question, before, after}, the ids before it and after it; null if it is not there. `where` is tried first. */
  async function read(run, source, id, where) {
    async function look(at) {
      const page = await data.load(`details/${run.at}/${source.key}/${at}`, source.finished);
      const place = page.questions.findIndex((one) => one.id === id), question = page.questions[place];
      if (!question) return null;
      const [before, after] = [page.questions[place - 1], page.questions[place + 1]].map((one) => one?.id);
      return { question, before: before ?? page.before, after: after ?? page.after };
    }
    const found = where ? await look(where).catch(() => null) : null;
    if (found) return found;
    for (const place of await placesIn(run, source, id)) {
      const other = await look(place.where);
      if (other) return other;
    }
    return null;
  }

  function passages(hits, selected) {
    const chosen = new Map(selected.map((place, rank) => [place, rank + 1]));
    return h("ol", { class: "passages" }, hits.map((hit, place) => h("li", { class: hit.gold ? "gold" : null },
      hit.gold ? h("span", { class: "tag" }, "gold ") : null,
      chosen.has(place) ? h("span", { class: "tag" }, `selected as ${chosen.get(place)} `) : null,
      h("strong", {}, `[${place + 1}] ${hit.title || hit.id}`),
      h("span", { class: "dim" }, ` ${number(hit.score, 3)}`),
      h("p", {}, hit.text))));
  }

  const toldOf = (step) => (step?.action ? `result of ${step.action}` : step?.hits.length ? `${step.hits.length} passages` : null);

  function found(step, tokens) {
    const gold = step.hits.filter((hit) => hit.gold).length;
    return h("details", {},
      h("summary", {}, toldOf(step), gold ? h("span", { class: "tag" }, `, ${gold} gold`) : null, h("span", { class: "dim" }, tokens)),
      step.action ? h("div", { class: "said" }, step.result) : passages(step.hits, step.selected));
  }

  /* What each turn of the model gained in log p of the gold answers, where that was scored in front of every turn. */
  function gains(turn) {
    const before = turn.turn_log_likelihoods;
    const turns = turn.segments.filter((segment, place) => segment.by === "model" && turn.segments[place - 1]?.by === "environment").length;
    if (!before.length || before.length < turns || turn.log_likelihood === undefined) return [];
    const all = [...before, turn.log_likelihood];
    return before.map((value, place) => (value === null || all[place + 1] === null ? null : all[place + 1] - value));
  }

  function body(turn) {
    const steps = [...turn.steps], gained = gains(turn);
    const later = turn.segments.filter((segment, place) => place && segment.by === "environment").length;
    /* Other recipes show passages in the prompt. */
    const shown = later ? [] : steps.splice(0);
    let turns = 0;
    return turn.segments.map((segment, place) => {
      if (segment.by === "environment") {
        if (place === 0) {
          return [h("details", {}, h("summary", {}, `prompt, ${segment.tokens} tokens`), h("div", { class: "said" }, segment.text)),
            shown.filter(toldOf).map((step) => found(step, " in the prompt"))];
        }
        const step = steps.shift();
        return toldOf(step) ? found(step, `, ${segment.tokens} tokens`) : h("div", { class: "said dim" }, segment.text.trim() || "…");
      }
      const gain = turn.segments[place - 1]?.by === "environment" ? gained[turns++] : null;
      return [
        h("div", { class: `said ${segment.trained ? "trained" : "untrained"}` },
          h("span", { class: "hidden" }, segment.trained ? "trained: " : "written, not trained: "), segment.text.trim()),
        h("div", { class: "dim" }, `${segment.tokens} tokens, log p ${number(segment.logprob, 2)}`,
          gain === null || gain === undefined ? "" : `, gain ${gain >= 0 ? "+" : ""}${number(gain, 2)} nats`),
      ];
    });
  }

  function bar(part) {
    const inner = h("span", {});
    inner.style.width = `${100 * part}%`;
    return h("div", { class: "share", "aria-hidden": "true" }, inner);
  }

  function verdictOn(turn) {
    if (turn.em === null) return null;
    return h("span", { class: `badge ${turn.em ? "good" : "bad"}` }, turn.em ? "right" : turn.f1 ? `F1 ${share(turn.f1)}` : "wrong");
  }

  const known = (value) => value !== undefined && value !== null;
  const logOf = (value) => (value === undefined ? null : value === null ? "minus infinity" : number(value, 2));

  function card(turn, several) {
    const title = (several.samples ? `Sample ${turn.sample + 1}` : "Trajectory") + (several.roles ? `, ${turn.role}` : "");
    return h("article", { "aria-label": title },
      h("header", {},
        h("h3", {}, title, " ", verdictOn(turn),
          turn.hinted ? h("span", { class: "badge dim" }, "hinted") : null),
        turn.em === null && !turn.answer ? null : h("p", {}, "Answer: ", h("strong", {}, turn.answer || "none")),
        known(turn.weight_share) ? [bar(turn.weight_share), h("p", { class: "dim" }, `${share(turn.weight_share)} of the question's weight`)] : null,
        facts([
          ["stopped", words(turn.stop_reason)],
          ["log p(y | x, z)", logOf(turn.log_likelihood)],
          ["weight", known(turn.weight) ? turn.weight.toPrecision(3) : null],
          ["log p/q", known(turn.log_ratio) ? number(turn.log_ratio, 2) : null],
          ["tokens", `${whole(turn.tokens)}, ${whole(turn.generated_tokens)} written`],
          ["model", turn.policy_version < 0 ? "base" : `version ${turn.policy_version}`],
        ]),
        turn.detail ? h("p", { class: "bad" }, turn.detail) : null),
      body(turn));
  }

  /* What is made when it is first opened. */
  function later(title, make) {
    const element = h("details", {}, h("summary", {}, title));
    element.addEventListener("toggle", () => element.append(...[make()].flat()), { once: true });
    return element;
  }

  /* What training is told of each example, and of each of its tokens. */
  function examples(question) {
    if (!question.examples.length) return null;
    const names = [...new Set(question.examples.flatMap((one) => Object.keys(one.numbers)))];
    return h("details", {}, h("summary", {}, `${question.examples.length} training examples`), ExSearch.table("What the loss is told of each", [
      ["example", (one) => one.id, "text"], ["trains", (one) => one.policy, "text"], ["role", (one) => one.role, "text"],
      ["in one step with", (one) => (one.unit === one.id ? "" : one.unit), "text"],
      ...names.map((name) => [words(name), (one) => number(one.numbers[name], 3)]),
    ], question.examples),
    question.examples.filter((one) => one.tokens.length).map((one) => later(`${one.id}, token by token`, () => byToken(one))));
  }

  function byToken(example) {
    const shown = (value) => (Array.isArray(value) ? value.map((one) => number(one, 3)).join(" ") : number(value, 3));
    const title = (name, values) => {
      const width = example.widths[name];
      return width > values[0].length ? `${words(name)}, the first ${values[0].length} of ${whole(width)}` : words(name);
    };
    return ExSearch.table(`What the loss is told of the trained tokens of ${example.id}`, [
      ["token", (place) => JSON.stringify(example.tokens[place]), "text"],
      ...Object.entries(example.by_token).map(([name, values]) => [title(name, values), (place) => shown(values[place])]),
    ], example.tokens.map((_, place) => place));
  }

  /* Links to the same question in the other phases of its split, and in other runs; and all of it beneath each other. */
  async function elsewhere(at, source, id, said) {
    const runs = await data.runs();
    const every = runs.flatMap((run) => run.sources.filter((one) => one.split === source.split).map((one) => ({
      run,
      source: one,
      title: (runs.length > 1 ? `${run.name}: ` : "") + ExSearch.runs.titleOf(one),
      here: run.at === at && one.key === source.key,
    })));
    const looked = await Promise.all(every.map(async (one) => {
      const places = await placesIn(one.run, one.source, id).catch(() => []);
      return { ...one, place: places.find(({ words }) => words < 0 || said < 0 || words === said) };
    }));
    const there = looked.filter((one) => one.place);
    if (there.length < 2) return [];
    return [h("h2", {}, "The same question"),
      h("ul", { class: "elsewhere" }, there.map((one) => h("li", {}, one.here
        ? h("strong", { "aria-current": "page" }, one.title)
        : h("a", { href: ExSearch.questions.link(one.run.at, one.source.key, id, one.place.where) }, one.title)))),
      later("side by side", () => {
        const compared = h("div", {}, h("p", { class: "dim" }, "reading"));
        sideBySide(there, id).then((content) => compared.replaceChildren(...content),
          (error) => compared.replaceChildren(h("p", { role: "alert" }, error.message)));
        return compared;
      })];
  }

  /* A line for each trajectory of the question, wherever it is. */
  async function sideBySide(there, id) {
    const lines = (await Promise.all(there.map(async ({ run, source, title, place }) => {
      const found = await read(run, source, id, place.where);
      return (found?.question.turns ?? []).map((turn) => ({ title, turn }));
    }))).flat();
    return [ExSearch.table("Every trajectory of this question", [
      ["trajectories of", (line) => line.title, "text"],
      ["sample", ({ turn }) => `${turn.sample + 1}, ${turn.role}`, "text"],
      ["answer", ({ turn }) => turn.answer || "none", "text"],
      ["verdict", ({ turn }) => verdictOn(turn)],
      ["searches", ({ turn }) => whole(turn.steps.filter((step) => step.hits.length).length)],
      ["weight", ({ turn }) => (known(turn.weight) ? turn.weight.toPrecision(3) : "–")],
      ["share", ({ turn }) => share(turn.weight_share)],
      ["log p(y | x, z)", ({ turn }) => logOf(turn.log_likelihood) ?? "–"],
      ["stopped", ({ turn }) => words(turn.stop_reason), "text"],
    ], lines),
    later("with their steps", () => lines.map((line) => h("section", {},
      h("h3", {}, `${line.title}, sample ${line.turn.sample + 1} `, verdictOn(line.turn)),
      h("ol", {}, line.turn.steps.map((step) => h("li", {}, step.query, " ", toldOf(step) ? found(step, "") : null,
        step.record ? h("div", { class: "said" }, step.record) : null))),
      h("p", {}, "Answer: ", h("strong", {}, line.turn.answer || "none")))))];
  }

  /* The ones around it in the list that it was chosen from, else in the source. */
  function neighbours(at, key, { question, before, after }) {
    const shown = ExSearch.questions.shown;
    const listed = shown?.at === at && shown.key === key ? shown.beside(question.id) : null;
    const to = (id, title, where) => (id === null || id === undefined ? null : h("a", { href: ExSearch.questions.link(at, key, id, where) }, title));
    return h("nav", { class: "paging", "aria-label": "Questions beside this one" },
      listed ? [to(listed.before?.id, "previous question", listed.before?.where), `${whole(listed.place + 1)} of ${whole(listed.of)}`,
        to(listed.after?.id, "next question", listed.after?.where)]
        : [to(before, "previous question"), to(after, "next question")]);
  }

  async function page(at, key, id, where) {
    const run = await data.run(at);
    const source = run.sources.find((one) => one.key === key);
    const found = source && (await read(run, source, id, where));
    if (!found) throw new Error(`there is no question ${id} among these`);
    const { question } = found;
    const several = {
      samples: new Set(question.turns.map((turn) => turn.sample)).size > 1,
      roles: new Set(question.turns.map((turn) => turn.role)).size > 1,
    };
    const links = h("div", {});
    const title = ExSearch.runs.titleOf(source);
    const asked = question.question || question.prompt || id;
    const shown = ExSearch.questions.shown;
    const list = shown?.at === at && shown.key === key ? shown.address : `#/run/${at}/questions/${key}`;
    let closed = false;
    return {
      trail: [[run.name, `#/run/${at}`], [title, list], [id, null]],
      title: asked.slice(0, LONGEST_TITLE),
      content: [
        neighbours(at, key, found),
        h("h1", {}, asked.length > LONGEST_TITLE ? `${asked.slice(0, LONGEST_TITLE)}…` : asked),
        asked.length > LONGEST_TITLE ? h("details", {}, h("summary", {}, "the whole question"), h("div", { class: "said" }, asked)) : null,
        facts([["gold answer", question.answers.join(" / ") || "not known"], ["hops", question.hops], ["type", question.type],
          ["gold passages", question.gold.join(", ")]]),
        question.steps.length
          ? h("details", {}, h("summary", {}, "gold steps"), h("ol", {}, question.steps.map((step) => h("li", {}, `${step.question} ${step.answer}`)))) : null,
        links,
        h("h2", {}, question.turns.length > 1 ? `${question.turns.length} trajectories` : "Trajectory"),
        h("p", { class: "dim" }, "Marked green: what the model wrote and is trained. Marked orange: what it wrote and is not trained."),
        examples(question),
        h("div", { class: "trajectories", tabindex: "0", role: "region", "aria-label": "Trajectories" }, question.turns.map((turn) => card(turn, several))),
      ],
      begin: () => elsewhere(at, source, id, question.words).then(
        (children) => { if (!closed) links.replaceChildren(...children); },
        (error) => { if (!closed) links.replaceChildren(h("p", { role: "alert" }, error.message)); }),
      close: () => { closed = true; },
      isOld: !ExSearch.runs.goesOn(run) ? null : async () => keysOf(await data.run(at), source) !== keysOf(run, source),
    };
  }

  /* Where the same question may be. */
  const keysOf = (run, source) => run.sources.filter((one) => one.split === source.split).map((one) => one.key).join();

  return { page };
})();
