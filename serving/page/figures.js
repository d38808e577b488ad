// One answer's figures, while it streams and at its end.

class Figures {
  constructor(began) {
    this.began = began; // milliseconds, as all times here
    this.first = this.last = null; // when the first and the last tokens came
    this.count = this.together = 0; // tokens; those that came with the first
    this.verifications = this.emitted = this.accepted = 0; // the prefill's token is in none of them
    this.drafted = []; // at each position, how often a token was drafted
    this.acceptedAt = []; // at each position, how often it was accepted
    this.inside = false; // the last token was a draft, so the next one belongs to the same verification
    this.final = null; // the server's figures
  }

  /** Events that came together. */
  add(events, now) {
    this.last = now;
    if (this.first === null) [this.first, this.together] = [now, events.length];
    for (const event of events) {
      if (this.count++ && event.token.origin) this.#verified(event.token.origin); // a server upstream has none
      this.final = event.details?.speculative ?? null;
    }
  }

  #verified({ source, position, drafted }) {
    if (!this.inside) {
      this.verifications += 1;
      for (let place = 0; place < drafted; place++) this.drafted[place] = (this.drafted[place] ?? 0) + 1;
    }
    this.emitted += 1;
    this.inside = source === "draft";
    if (!this.inside) return;
    this.accepted += 1;
    this.acceptedAt[position - 1] = (this.acceptedAt[position - 1] ?? 0) + 1;
  }

  /** Tokens emitted / verifications, the bonus token included; null before the first. */
  get acceptanceLength() {
    if (this.final) return this.final.acceptance_length;
    return this.verifications ? this.emitted / this.verifications : null;
  }

  /** Accepted tokens, and at the end the drafted ones: a tree drafts several per position, which events don't count. */
  get drafts() {
    if (!(this.final ?? this).verifications) return "–";
    return this.final ? `${this.final.accepted} of ${this.final.drafted}` : `${this.accepted}`;
  }

  /** Accepted / drafted at each draft position; null where nothing was drafted. */
  get perPosition() {
    if (this.final) return this.final.acceptance_per_position;
    return this.drafted.map((drafted, place) => (drafted ? (this.acceptedAt[place] ?? 0) / drafted : null));
  }

  /** Tokens per second after the first ones, whose time is that of the prompt; null while there are no others. */
  get speed() {
    return this.last > this.first ? (1000 * (this.count - this.together)) / (this.last - this.first) : null;
  }

  get secondsToFirst() {
    return this.first === null ? null : (this.first - this.began) / 1000;
  }
}

function digits(value, places) {
  return value === null || value === undefined ? "–" : value.toFixed(places);
}

function percent(share) {
  return share === null ? "–" : `${(100 * share).toFixed(share > 0 && share < 0.01 ? 1 : 0)} %`;
}

function seconds(value) {
  if (value === null) return "–";
  return value < 1 ? `${Math.round(1000 * value)} ms` : `${value.toFixed(1)} s`;
}

function plural(count, what) {
  return `${count} ${what}${count === 1 ? "" : "s"}`;
}
