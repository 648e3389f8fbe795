"use strict";
/* One question: its trajectories side by side, turn by turn. */

ExSearch.question = (() => {
  const { h, format, data } = ExSearch;
  const { number, whole, share } = format;

  const idsOf = (at, source) => data.load(`ids/${at}/${source.key}`, { fresh: !source.finished });

  async function findIn(at, source, id) {
    const { parts } = await idsOf(at, source);
    for (const [part, ids] of Object.entries(parts)) {
      const place = ids.indexOf(id);
      if (place >= 0) return { part, place };
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

  /* What the environment wrote behind a turn: the passages of the next step, where there are any left to tell. */
  function answerOf(segment, step) {
    const told = !step ? null : step.action ? `result of ${step.action}` : step.hits.length ? `${step.hits.length} passages` : null;
    if (!told) return h("div", { class: "said dim" }, segment.text.trim() || "…");
    const gold = step.hits.filter((hit) => hit.gold).length;
    return h("details", {},
      h("summary", {}, told, gold ? h("span", { class: "tag" }, `, ${gold} gold`) : null, h("span", { class: "dim" }, `, ${segment.tokens} tokens`)),
      step.action ? h("div", { class: "said" }, step.result) : passages(step.hits, step.selected));
  }

  function gains(turn) {
    const before = turn.turn_log_likelihoods;
    if (before.length < 2 || turn.log_likelihood === undefined) return [];
    const all = [...before, turn.log_likelihood];
    return before.map((value, place) => (value === null || all[place + 1] === null ? null : all[place + 1] - value));
  }

  function body(turn) {
    const steps = [...turn.steps], gained = gains(turn);
    let turns = 0;
    return turn.segments.map((segment, place) => {
      if (segment.by === "environment") {
        if (place === 0) return h("details", {}, h("summary", {}, `prompt, ${segment.tokens} tokens`), h("div", { class: "said" }, segment.text));
        return answerOf(segment, steps.shift());
      }
      const previous = turn.segments[place - 1];
      const gain = previous?.by === "environment" ? gained[turns++] : null;
      return [
        h("div", { class: `said ${segment.trained ? "trained" : "untrained"}` },
          h("span", { class: "hidden" }, segment.trained ? "trained: " : "written, not trained: "), segment.text.trim()),
        h("div", { class: "dim" }, `${segment.tokens} tokens, log p ${number(segment.logprob, 2)}`,
          gain === null || gain === undefined ? "" : `, gain ${gain >= 0 ? "+" : ""}${number(gain, 2)} nats`),
      ];
    });
  }

  function card(turn, several) {
    const facts = [
      ["stopped", turn.stop_reason.replaceAll("_", " ")],
      turn.log_likelihood === undefined ? null : ["log p(y | x, z)", number(turn.log_likelihood, 2)],
      turn.log_weight === undefined || turn.log_weight === null ? null : ["weight", Math.exp(turn.log_weight).toPrecision(3)],
      turn.log_ratio === undefined || turn.log_ratio === null ? null : ["log p/q", number(turn.log_ratio, 2)],
      ["tokens", `${whole(turn.tokens)}, ${whole(turn.generated_tokens)} written`],
      ["model", turn.policy_version < 0 ? "base" : `version ${turn.policy_version}`],
    ].filter(Boolean);
    const verdict = turn.em === null ? null
      : h("span", { class: `badge ${turn.em ? "good" : "bad"}` }, turn.em ? "right" : turn.f1 ? `F1 ${share(turn.f1)}` : "wrong");
    return h("article", {},
      h("header", {},
        h("h3", {}, several.samples ? `Sample ${turn.sample + 1}` : "Trajectory", several.roles ? `, ${turn.role}` : "", " ", verdict,
          turn.hinted ? h("span", { class: "badge dim" }, "hinted") : null),
        h("p", {}, "Answer: ", h("strong", {}, turn.answer || "none")),
        turn.weight_share === undefined || turn.weight_share === null ? null : [
          h("div", { class: "share", "aria-hidden": "true" }, h("span", { style: `width: ${100 * turn.weight_share}%` })),
          h("p", { class: "dim" }, `${share(turn.weight_share)} of the question's weight`)],
        h("dl", { class: "facts" }, facts.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value)))),
        turn.detail ? h("p", { class: "bad" }, turn.detail) : null),
      body(turn));
  }

  /* What training is told of each example, beside its tokens. */
  function examples(question) {
    const names = [...new Set(question.examples.flatMap((one) => Object.keys(one.numbers)))];
    if (!names.length) return null;
    return h("details", {}, h("summary", {}, `${question.examples.length} training examples`), ExSearch.table("What the loss is told of each", [
      ["example", (one) => one.id, "text"], ["trains", (one) => one.policy, "text"], ["role", (one) => one.role, "text"],
      ["in one step with", (one) => (one.unit === one.id ? "" : one.unit), "text"],
      ...names.map((name) => [name.replaceAll("_", " "), (one) => number(one.numbers[name], 3)]),
    ], question.examples));
  }

  async function elsewhere(at, key, id) {
    const list = await data.load("runs");
    const found = await Promise.all(list.runs.map(async (one, run) => Promise.all((await data.load(`run/${run}`)).sources.map(async (source) => {
      const title = (list.runs.length > 1 ? `${one.name}: ` : "") + ExSearch.runs.titleOf(source);
      if (run === at && source.key === key) return h("li", {}, h("strong", { "aria-current": "page" }, title));
      return (await findIn(run, source, id)) ? h("li", {}, h("a", { href: ExSearch.questions.link(run, source.key, { id }) }, title)) : null;
    }))));
    const links = found.flat().filter(Boolean);
    return links.length > 1 ? [h("h2", {}, "The same question"), h("ul", { class: "elsewhere" }, links)] : [];
  }

  function neighbours(at, key, id, ids) {
    const shown = ExSearch.questions.shown;
    const order = shown?.at === at && shown.key === key && shown.ids.includes(id) ? shown.ids : ids;
    const place = order.indexOf(id);
    const to = (other, title) => (other === undefined ? null : h("a", { href: ExSearch.questions.link(at, key, { id: other }) }, title));
    return h("nav", { class: "paging", "aria-label": "Questions beside this one" }, to(order[place - 1], "previous question"),
      `${whole(place + 1)} of ${whole(order.length)}`, to(order[place + 1], "next question"));
  }

  async function page(at, key, id) {
    const [list, run] = await Promise.all([data.load("runs"), data.load(`run/${at}`)]);
    const source = run.sources.find((one) => one.key === key);
    const where = source && (await findIn(at, source, id));
    if (!where) throw new Error(`there is no question ${id} among these`);
    const found = await data.load(`details/${at}/${key}/${where.part}/${Math.floor(where.place / list.per_page)}`);
    const question = found.questions.find((one) => one.id === id);
    const several = {
      samples: new Set(question.turns.map((turn) => turn.sample)).size > 1,
      roles: new Set(question.turns.map((turn) => turn.role)).size > 1,
    };
    const links = h("div", {});
    const title = ExSearch.runs.titleOf(source);
    return {
      trail: [[list.runs[at].name, `#/run/${at}`], [title, `#/run/${at}/questions/${key}`], [id, null]],
      title: question.question || id,
      content: [
        neighbours(at, key, id, Object.values((await idsOf(at, source)).parts).flat()),
        h("h1", {}, question.question || id),
        h("dl", { class: "facts" }, [
          ["gold answer", question.answers.join(" / ") || "not known"], ["hops", question.hops], ["type", question.type],
          ["gold passages", question.gold.join(", ")],
        ].filter(([, value]) => value !== null && value !== "").map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, String(value))))),
        question.steps.length
          ? h("details", {}, h("summary", {}, "gold steps"), h("ol", {}, question.steps.map((step) => h("li", {}, `${step.question} ${step.answer}`)))) : null,
        links,
        h("h2", {}, question.turns.length > 1 ? `${question.turns.length} trajectories` : "Trajectory"),
        h("p", { class: "dim" }, "Marked green: what the model wrote and is trained. Marked orange: what it wrote and is not trained."),
        examples(question),
        h("div", { class: "trajectories", tabindex: "0", role: "region", "aria-label": "Trajectories" }, question.turns.map((turn) => card(turn, several))),
      ],
      begin: () => elsewhere(at, key, id).then((children) => links.replaceChildren(...children), (error) => ExSearch.fail(error)),
    };
  }

  return { page };
})();
