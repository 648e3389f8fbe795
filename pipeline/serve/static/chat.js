"use strict";

// A conversation with the server that this page came from. What is said stays in this page; only the token is kept,
// until the tab is closed.

const LOOK_AGAIN_MS = 2000;

const at = (id) => document.getElementById(id);
const said = [];
let model = ""; // empty while nothing is answered
let asking = null;
let lookAgain = 0;

function make(name, text, className) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}

function headers() {
  const token = sessionStorage.getItem("token");
  return token ? { authorization: `Bearer ${token}` } : {};
}

async function request(path, options = {}) {
  let reply;
  try {
    reply = await fetch(path, { ...options, headers: { ...options.headers, ...headers() } });
  } catch (error) {
    throw error.name === "AbortError" ? error : new Error("The server cannot be reached.");
  }
  if (reply.ok) return reply;
  const body = await reply.json().catch(() => null);
  const error = new Error(body && body.error ? body.error.message : `the server answered ${reply.status}`);
  error.wantsToken = reply.status === 401;
  throw error;
}

// What is said twice would be read out twice.
function say(text) {
  if (at("state").textContent !== text) at("state").textContent = text;
}

function showModel(version) {
  at("model").textContent = `${model}, version ${version}`;
}

// Looks until questions are answered, and says meanwhile why they are not.
async function begin() {
  clearTimeout(lookAgain);
  try {
    await request("readyz");
    const [first] = (await (await request("v1/models")).json()).data;
    model = first.id;
    showModel(first.exsearch.version);
    at("access").hidden = true;
    if (!asking) say("");
  } catch (error) {
    model = "";
    say(error.message);
    if (error.wantsToken) at("access").hidden = false;
    else lookAgain = setTimeout(begin, LOOK_AGAIN_MS);
  }
  at("send").disabled = !model || Boolean(asking);
}

// Server-sent events come in pieces of any length.
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const line = part.split("\n").find((one) => one.startsWith("data: "));
      if (line && line !== "data: [DONE]") yield JSON.parse(line.slice(6));
    }
  }
}

function passageList(passages) {
  const list = make("ol");
  for (const passage of passages) {
    const item = make("li");
    const details = make("details");
    details.append(make("summary", passage.title || passage.id), make("p", passage.text));
    item.append(details);
    list.append(item);
  }
  return list;
}

const SAID = { think: "Thinks", record: "Writes down", select: "Chooses", call: "Calls", result: "Gets" };

function showStep(steps, event) {
  const item = make("li");
  if (event.type === "search") {
    item.append(make("span", event.passages.length ? "Found:" : "Found nothing."), passageList(event.passages));
  } else {
    item.append(make("span", `${SAID[event.type]}: `, "dim"), make("span", event.text));
  }
  steps.append(item);
}

function showCitation(card, citation, steps) {
  const passage = steps[citation.step].hits.find((hit) => hit.id === citation.passage_id);
  const text = passage[citation.field];
  const quote = make("blockquote");
  // Positions count code points, as Python does.
  const letters = Array.from(text);
  const part = (from, to) => letters.slice(from, to).join("");
  quote.append(part(0, citation.start), make("mark", part(citation.start, citation.end)), part(citation.end));
  card.append(make("p", citation.title || citation.passage_id, "dim"), quote);
}

function showEnd(card, end) {
  showModel(end.version);
  if (end.stop_reason !== "answered") card.append(make("p", `stopped: ${end.stop_reason}`, "dim"));
  if (!end.citations.length) return;
  const details = make("details");
  details.append(make("summary", `Sources (${end.citations.length})`));
  for (const citation of end.citations) showCitation(details, citation, end.steps);
  card.append(details);
}

// Empty if the agent found none.
async function answer(card) {
  const reply = await request("v1/chat/completions", {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify({ model, messages: said, stream: true }),
    signal: asking.signal,
  });
  const way = make("details");
  way.open = true;
  const steps = make("ol");
  way.append(make("summary", "How it got there"), steps);
  const answered = make("p", "", "answer");
  card.append(way, answered);
  for await (const chunk of events(reply.body)) {
    if (chunk.error) throw new Error(chunk.error.message);
    const [choice] = chunk.choices;
    if (choice && choice.delta.content) answered.textContent += choice.delta.content;
    if (!chunk.exsearch) continue;
    if (!chunk.exsearch.event) showEnd(card, chunk.exsearch);
    else if (chunk.exsearch.event.type !== "answer") showStep(steps, chunk.exsearch.event);
  }
  way.open = false;
  const found = answered.textContent;
  if (!found) answered.textContent = "(no answer)";
  return found;
}

function setAsking(now) {
  asking = now;
  at("send").disabled = now !== null;
  at("stop").disabled = now === null;
  say(now === null ? "" : "The agent is at work.");
}

async function ask(question) {
  if (!model || asking) return;
  said.push({ role: "user", content: question });
  at("question").value = "";
  setAsking(new AbortController());
  const card = make("article");
  card.append(make("h2", question));
  at("talk").append(card);
  let failed = false;
  try {
    const found = await answer(card);
    // A question without an answer is nothing that later ones could build on.
    if (found) said.push({ role: "assistant", content: found });
    else said.pop();
  } catch (error) {
    said.pop();
    failed = error.name !== "AbortError";
    card.append(make("p", failed ? error.message : "stopped", failed ? "bad" : "dim"));
    if (failed) at("question").value = question;
  }
  setAsking(null);
  at("question").focus();
  if (failed) begin();
}

at("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const question = at("question").value.trim();
  if (question) ask(question);
});
at("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    at("ask").requestSubmit();
  }
});
at("stop").addEventListener("click", () => asking && asking.abort());
at("new").addEventListener("click", () => {
  if (asking) asking.abort();
  said.length = 0;
  at("talk").replaceChildren();
  at("question").focus();
});
at("access").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("token", at("token").value);
  begin();
});
begin();
