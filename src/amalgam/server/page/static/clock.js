// Times the tokens of an answer as they come.

export class Stopwatch {
  constructor() {
    this.tokens = 0;
    this.begun = performance.now();
  }

  // So many have come so far.
  tick(tokens) {
    if (tokens <= this.tokens) return;
    this.latest = performance.now();
    this.first ??= { at: this.latest, tokens };
    this.tokens = tokens;
  }

  // Seconds until the first token; null before it.
  get waited() {
    return this.first === undefined ? null : (this.first.at - this.begun) / 1000;
  }

  // Tokens per second after the first ones; null before others come.
  get speed() {
    return this.tokens > (this.first?.tokens ?? 0) ? ((this.tokens - this.first.tokens) / (this.latest - this.first.at)) * 1000 : null;
  }
}
