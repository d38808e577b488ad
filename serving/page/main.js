// The form and its buttons.

const SHOW_EVERY = 60; // milliseconds: painting each token would take time from a server on the same machine

const $ = (id) => document.getElementById(id);
const prompt = $("prompt");
let info = null; // the answer of /info
let running = null; // the AbortController of what runs
let again = 0; // the timer of the next try to connect

const hideTip = watchTokens($("cards"), $("tip"));

// the server

function say(element, words) {
  element.textContent = words;
  element.hidden = !words;
}

async function connect() {
  clearTimeout(again);
  try {
    info = await serverInfo($("key").value);
  } catch (error) {
    $("state").dataset.state = "off";
    $("state").textContent = error.status === 503 ? "Loading …" : error.status === 401 ? "Key needed" : "Not connected";
    if (error.status === 401) $("access").open = true;
    if (error.status !== 503) return fail(error);
    again = setTimeout(connect, 2000); // the model is being loaded
    return;
  }
  say($("error"), "");
  $("state").dataset.state = "on";
  $("state").textContent = "Ready";
  showServer();
}

function drafts() {
  return info === null || info.limits.max_draft_tokens > 0;
}

/** True where requests may set this field of `speculative`: a server upstream may not know it. */
function takes(field) {
  return info === null || info.speculative_fields.includes(field);
}

function comparable() {
  return drafts() && takes("enabled");
}

function showServed() {
  const { model_id, head, dtype, device, speculation_length, tree_size, lookup_length, engine } = info;
  const shape = tree_size ? `trees of ${tree_size}, depth ${speculation_length}` : `chains up to ${speculation_length}`;
  const drafter = head ? `head ${head.name}${speculation_length ? `, ${shape}` : ""}` : "no draft head";
  const copies = lookup_length ? [`copies up to ${lookup_length}`] : [];
  const place = engine.server ? [`by ${engine.server}`] : [`${dtype} on ${device}`];
  const tau = engine.server && engine.speculation.acceptance_length;
  if (tau) place.push(`acceptance length ${digits(tau, 2)} in all`);
  $("served").textContent = [model_id, drafter, ...copies, ...place].join(" · ");
}

function showServer() {
  const { head, limits, chat_template, engine } = info;
  showServed();
  const why = head ? "runs with speculation off" : "has no draft head and copies nothing";
  const away = head ? "--speculation auto" : "--speculation auto, or with a --head,";
  const missing = `This server ${why}, so the target supplies every token, and there is nothing to compare. `;
  say($("notice"), drafts() || engine.server ? "" : `${missing}Start it with ${away} to see speculation.`);
  showDegraded();
  $("max_new_tokens").max = limits.max_new_tokens;
  $("num_tokens").max = limits.max_draft_tokens;
  $("num_tokens").placeholder = `up to ${limits.max_draft_tokens}`;
  $("num_tokens").disabled = !drafts() || !takes("num_tokens");
  $("compare").disabled = !comparable();
  if (!chat_template) {
    document.querySelector("[value=chat]").disabled = true;
    document.querySelector("[value=raw]").checked = true;
  }
}

function showDegraded() {
  const reason = info.head?.degraded;
  say($("degraded"), reason ? `Speculation is degraded: ${reason} The answers are right all the same.` : "");
}

/** Ask again how speculation is doing: that may have changed since the page was opened. */
async function refresh() {
  try {
    info = await serverInfo($("key").value);
    showServed();
    showDegraded();
  } catch {
    // the next request says what is wrong
  }
}

function fail(error) {
  say($("error"), error.message);
  if (error.status === 401) {
    $("access").open = true;
    $("key").focus();
  }
}

// a request

function number(id) {
  return $(id).value === "" ? undefined : Number($(id).value);
}

/** The form's values, as `generate` takes them. */
function formValues() {
  const parameters = { chat: document.querySelector("[value=chat]").checked };
  for (const name of ["max_new_tokens", "temperature", "top_p", "top_k"]) parameters[name] = number(name);
  const stop = $("stop_strings").value.split("\n").filter(Boolean);
  if (stop.length) parameters.stop = stop.map((each) => each.replaceAll("\\n", "\n"));
  parameters.speculative = {};
  if (takes("origin")) parameters.speculative.origin = true;
  if (takes("num_tokens")) parameters.speculative.num_tokens = number("num_tokens");
  const { temperature, top_p, top_k } = parameters;
  const samples = temperature > 0 || (temperature === undefined && (top_p ?? top_k) !== undefined);
  // drawn here rather than by the server, so that both answers of a comparison have the same one
  const drawn = samples ? String(crypto.getRandomValues(new Uint32Array(1))[0]) : "";
  return { inputs: prompt.value, parameters, seed: $("seed").value || drawn };
}

/** Send one request and show the answer as it comes. Returns the facts about the whole answer. */
async function follow(request, card, signal) {
  const plain = request.parameters.speculative.enabled === false || !drafts();
  const figures = new Figures(performance.now());
  const ids = [];
  let details = null;
  let unseen = [];
  let timer = 0;
  function show() {
    clearTimeout(timer);
    timer = 0;
    if (unseen.length) card.add(unseen);
    unseen = [];
    if (ids.length) card.show(figures, plain);
  }
  card.phase = "running";
  try {
    for await (const events of generate(request, $("key").value, signal)) {
      figures.add(events, performance.now());
      unseen.push(...events);
      timer ||= setTimeout(show, SHOW_EVERY);
      ids.push(...events.map(({ token }) => token.id));
      details = events.at(-1).details;
    }
    card.phase = "";
  } catch (error) {
    card.phase = error.name === "AbortError" ? `stopped after ${plural(ids.length, "token")}` : "incomplete";
    throw error;
  } finally {
    show();
    card.end(details, request.seed);
  }
  return { ids, text: card.text, speed: figures.speed, details, figures };
}

// the buttons

function setRunning(controller) {
  running = controller;
  const busy = controller !== null;
  const focused = document.activeElement;
  $("stop").disabled = !busy;
  $("run").disabled = busy;
  $("compare").disabled = busy || !comparable();
  // a disabled button would take the keyboard's focus with it
  if (busy && [$("run"), $("compare")].includes(focused)) $("stop").focus();
  if (!busy && focused === $("stop")) $("run").focus();
}

/** Check the form, make a card per title, run `work`, and report its end. */
async function perform(titles, work) {
  if (running) return;
  if (!$("form").reportValidity()) return;
  const controller = new AbortController();
  const cards = titles.map((title) => new Card(title));
  hideTip();
  setRunning(controller);
  say($("error"), "");
  $("empty").hidden = $("verdict").hidden = true;
  $("legend").hidden = !takes("origin");
  const { speculation_length: length = LEVELS, lookup_length: copied = 0 } = info ?? {};
  showLegend($("legend").querySelector("ul"), { length, copied });
  $("cards").classList.toggle("pair", cards.length > 1);
  $("cards").replaceChildren(...cards.map((card) => card.root));
  const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
  if ($("results").getBoundingClientRect().top > innerHeight / 2)
    $("results").scrollIntoView({ behavior: still ? "auto" : "smooth" });
  try {
    $("progress").textContent = await work(cards, controller.signal);
    await refresh();
  } catch (error) {
    $("progress").textContent = error.name === "AbortError" ? "Stopped." : "Failed.";
    if (error.name !== "AbortError") fail(error);
    for (const card of cards.filter((each) => !each.answer.firstElementChild)) card.root.remove();
  }
  setRunning(null);
}

function runOnce() {
  return perform(["Answer"], async ([card], signal) => {
    $("progress").textContent = "Answering …";
    const { details, figures } = await follow(formValues(), card, signal);
    const { enabled, drafted, verifications } = details.speculative ?? {};
    const idle = info?.speculation === "auto" && enabled && verifications && !drafted;
    const about = idle ? " Nothing was drafted: the server found plain decoding to be faster." : "";
    return `Done: ${plural(details.generated_tokens, "token")}, ${digits(figures.speed, 1)} per second.${about}`;
  });
}

function compare() {
  return perform(["With speculation", "Speculation off"], async ([first, second], signal) => {
    const request = formValues();
    const { origin } = request.parameters.speculative;
    request.parameters.speculative.enabled = true;
    $("progress").textContent = "Answering with speculation, 1 of 2 …";
    second.phase = "waiting for the first";
    const on = await follow(request, first, signal);
    $("progress").textContent = "Answering with speculation off, 2 of 2 …";
    request.parameters.speculative = { origin, enabled: false };
    const off = await follow(request, second, signal);
    showVerdict(on, off);
    return "Done: both answers are there.";
  });
}

function showVerdict(on, off) {
  const part = (name, words) => ($("verdict").querySelector(`.${name}`).textContent = words);
  const ratio = on.speed && off.speed ? on.speed / off.speed : null;
  $("verdict").hidden = false;
  part("ratio", ratio === null ? "–" : `${ratio.toFixed(2)} ×`);
  const how = ratio > 1.02 ? "is faster" : ratio < 0.98 ? "is slower" : "makes no difference";
  const speeds = `${digits(on.speed, 1)} tokens per second with it, ${digits(off.speed, 1)} without.`;
  part("words", ratio === null ? "Too short to measure a speed." : `Speculation ${how} here: ${speeds}`);
  part("identity", identity(on, off));
}

/** State that the texts are the same, or a reason why they differ. */
function identity(on, off) {
  if (on.text === off.text) return "The two texts are identical.";
  const place = on.ids.findIndex((id, index) => id !== off.ids[index]);
  const from = `The texts differ from token ${(place < 0 ? on.ids.length : place) + 1} on: `;
  const sampled = on.details.seed !== null;
  if (sampled && on.details.speculative?.rule === "rejection")
    return `${from}under the rejection rule a seed gives another text with speculation, of the same distribution.`;
  return `${from}passes of different widths round differently${info ? ` in ${info.dtype}` : ""}, and a near tie was decided the other way.`;
}

// events

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  runOnce();
});
$("compare").addEventListener("click", compare);
$("stop").addEventListener("click", () => running?.abort());
$("form").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    runOnce();
  }
});
$("form").addEventListener("invalid", ({ target }) => target.closest("details")?.setAttribute("open", ""), true);
$("key").addEventListener("input", () => storeKey($("key").value));
$("key").addEventListener("change", connect);
for (const example of document.querySelectorAll(".examples button")) {
  example.addEventListener("click", () => {
    prompt.value = example.textContent;
    prompt.focus();
  });
}

$("key").value = storedKey();
$("settings").open = matchMedia("(min-width: 60rem)").matches;
connect();
