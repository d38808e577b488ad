// The view of an answer: its tokens, the facts about each, and its figures.

const LEVELS = 5; // shades of draft positions; those further on share the last
const BARS = 10; // draft positions whose acceptance is shown; lookup copies more at a time
const GLYPHS = { "\n": "↵", "\t": "⇥", " ": "␣" };
const FIRST = "The target supplied it with the pass over the prompt.";
const ENDS = { length: "cut at the limit", eos_token: "ended by the model", stop_sequence: "ended by a stop string" };

function make(name, className = "", text = "") {
  const element = document.createElement(name);
  if (className) element.className = className;
  element.textContent = text;
  return element;
}

/** A token's text in quotes, with what cannot be seen made visible. */
function quoted({ text, special }) {
  if (special) return text;
  if (text === "" || text === "\ufffd") return "a part of a character";
  return `“${text.replace(/[\n\t]/g, (character) => GLYPHS[character])}”`;
}

function kindOf(origin) {
  if (!origin) return "unsaid"; // by a server upstream
  const { source, drafter, rejected } = origin;
  if (source === "draft") return drafter === "lookup" ? "copied" : "draft";
  return rejected ? "instead" : "target";
}

/** The facts about a token, one sentence per line. */
function describe({ index, token }) {
  const { source, drafter, position, rejected } = token.origin ?? {};
  const copied = drafter === "lookup";
  const drafted = copied ? `Copied from the text before at position ${position}` : `Drafted at position ${position}`;
  const lines = source ? [source === "draft" ? `${drafted}, and accepted.` : "Supplied by the target."] : [];
  const proposed = copied ? "Lookup had copied" : "The draft head had proposed";
  if (rejected) lines.push(`${proposed} ${quoted(rejected)}, which was rejected.`);
  else if (index === 1) lines.push(FIRST);
  else if (source === "target") lines.push("Nothing had been drafted in its place.");
  if (token.logprob !== null) lines.push(`Probability ${probability(Math.exp(token.logprob))}.`);
  lines.push(`Token ${index} of the answer, id ${token.id}.`);
  return lines;
}

function probability(value) {
  return value < 0.001 ? "below 0.1 %" : `${(100 * value).toFixed(1)} %`;
}

function tokenElement(event) {
  const { token } = event;
  const element = make("span", "token");
  const mark = make("span", "mark");
  const kind = kindOf(token.origin);
  element.setAttribute("role", "option");
  element.setAttribute("aria-selected", "false");
  element.setAttribute("aria-label", quoted(token));
  element.tabIndex = -1;
  element.dataset.kind = kind;
  if (token.origin?.position) mark.dataset.position = token.origin.position;
  if (kind === "draft") mark.dataset.level = Math.min(token.origin.position, LEVELS);
  // spaces stand outside of the mark, which would otherwise begin on the line before its word
  const [, space, text] = /^(\s*)([^]*)$/.exec(token.special ? "" : token.text);
  mark.textContent = text;
  if (token.special) mark.dataset.glyph = token.text;
  else if (!text) mark.dataset.glyph = GLYPHS[space[0]] ?? "·";
  element.append(...(text ? [space, mark] : [mark, space]));
  element.event = event;
  return element;
}

/** One answer with its figures; built from the template #card. */
class Card {
  constructor(title) {
    this.root = document.getElementById("card").content.firstElementChild.cloneNode(true);
    this.part = (selector) => this.root.querySelector(selector);
    this.part("h2").textContent = title;
    this.answer = this.part(".answer");
    this.answer.setAttribute("aria-label", `${title}: the answer's tokens`);
    this.text = "";
    this.bars = [];
  }

  set phase(words) {
    this.part(".phase").textContent = words;
    this.root.classList.toggle("running", words === "running");
    this.answer.setAttribute("aria-busy", String(words === "running"));
  }

  add(events) {
    const elements = events.map(tokenElement);
    if (!this.answer.firstElementChild) elements[0].tabIndex = 0; // one stop of the tab key, then arrows
    this.answer.append(...elements);
    this.text += events.map(({ token }) => (token.special ? "" : token.text)).join("");
  }

  /** plain: speculation is off, and there are no figures of drafts. */
  show(figures, plain) {
    const shown = {
      speed: digits(figures.speed, 1),
      tau: digits(figures.acceptanceLength, 2),
      accepted: plain ? "–" : figures.drafts,
      first: seconds(figures.secondsToFirst),
    };
    for (const [name, text] of Object.entries(shown)) this.part(`[data-figure=${name}]`).textContent = text;
    const shares = plain ? [] : figures.perPosition;
    this.part(".positions").hidden = shares.length === 0;
    shares.slice(0, BARS).forEach((share, place) => this.#bar(place).set(share));
  }

  /** details: of the last event; null when the answer was cut short. */
  end(details, seed) {
    this.part(".plain").textContent = `The answer as plain text: ${this.text}`;
    if (!details) return;
    const parts = [plural(details.generated_tokens, "token"), ENDS[details.finish_reason]];
    parts.push(`prompt of ${plural(details.input_length, "token")}`);
    if (seed) parts.push(`seed ${seed}`);
    this.part(".end").textContent = parts.join(" · ");
  }

  #bar(place) {
    while (this.bars.length <= place) {
      const [row, track, fill, value] = [make("li"), make("span", "track"), make("span", "fill"), make("span", "share")];
      row.append(make("span", "place", `${this.bars.length + 1}`), track, value);
      track.append(fill);
      track.setAttribute("aria-hidden", "true");
      this.part(".positions ol").append(row);
      this.bars.push({
        set: (share) => {
          fill.style.width = `${100 * (share ?? 0)}%`;
          value.textContent = percent(share);
        },
      });
    }
    return this.bars[place];
  }
}

/** Explain the colours, for the most tokens that the head drafts in a row, and that are copied; 0: it does not. */
function showLegend(legend, { length, copied }) {
  const items = [["target", ["abc"], "from the target"]];
  if (length > 0) {
    const places = Array.from({ length: Math.min(length, LEVELS) }, (_, place) => `${place + 1}`);
    if (length > LEVELS) places[LEVELS - 1] += "+";
    items.push(["draft", places, "drafted at this position by the head and accepted"]);
  }
  if (copied > 0) items.push(["copied", ["abc"], "copied from the text before and accepted"]);
  if (length > 0 || copied > 0) items.push(["instead", ["abc"], "from the target, in place of a rejected draft"]);
  const entries = items.map(([kind, marks, words]) => {
    const item = make("li");
    item.dataset.kind = kind;
    for (const text of marks) {
      const mark = make("span", "mark", text);
      if (kind === "draft") mark.dataset.level = parseInt(text);
      item.append(mark, " ");
    }
    item.append(words);
    return item;
  });
  legend.replaceChildren(...entries);
}

/** The tooltip: by pointer, by focus and by tap; Escape closes it. Arrows, Home and End move among tokens. */
function watchTokens(area, tip) {
  let shown = null;
  const tokenAt = (event) => event.target.closest?.(".token");
  const steps = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1, Home: -Infinity, End: Infinity };

  function show(token) {
    hide();
    shown = token;
    const name = make("p", "name", quoted(token.event.token));
    tip.replaceChildren(name, ...describe(token.event).map((line) => make("p", "", line)));
    tip.hidden = false;
    token.setAttribute("aria-describedby", tip.id);
    token.classList.add("shown");
    const around = token.querySelector(".mark").getBoundingClientRect();
    const { offsetWidth: width, offsetHeight: height } = tip;
    const room = document.documentElement.clientWidth - width - 8;
    const below = around.bottom + height + 20 < innerHeight || around.top < height + 8;
    tip.style.left = `${scrollX + Math.max(8, Math.min(around.left, room))}px`;
    tip.style.top = `${scrollY + (below ? around.bottom + 14 : around.top - height - 6)}px`;
  }

  function hide() {
    shown?.removeAttribute("aria-describedby");
    shown?.classList.remove("shown");
    shown = null;
    tip.hidden = true;
  }

  function leave({ relatedTarget }) {
    const to = relatedTarget?.closest?.(".token, #tip");
    const focused = area.contains(document.activeElement) ? document.activeElement.closest(".token") : null;
    if (to) return;
    if (focused) show(focused);
    else hide();
  }

  area.addEventListener("pointerover", (event) => tokenAt(event) && show(tokenAt(event)));
  area.addEventListener("pointerout", leave);
  tip.addEventListener("pointerleave", leave);
  area.addEventListener("click", (event) => tokenAt(event)?.focus());
  area.addEventListener("focusin", (event) => {
    const token = tokenAt(event);
    if (!token) return;
    token.parentElement.querySelector("[tabindex='0']")?.setAttribute("tabindex", "-1");
    token.tabIndex = 0;
    show(token);
  });
  area.addEventListener("focusout", (event) => tokenAt(event) && hide());
  area.addEventListener("keydown", (event) => {
    const token = tokenAt(event);
    if (!token || !(event.key in steps) || event.ctrlKey || event.metaKey || event.altKey) return;
    const all = [...token.parentElement.children];
    const place = Math.max(0, Math.min(all.length - 1, all.indexOf(token) + steps[event.key]));
    all[place].focus();
    event.preventDefault();
  });
  addEventListener("keydown", (event) => event.key === "Escape" && hide());
  return hide;
}
