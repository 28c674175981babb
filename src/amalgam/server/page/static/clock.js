// Times the pieces of an answer as they come.

export class Stopwatch {
  constructor() {
    this.pieces = 0;
    this.begun = performance.now();
  }

  tick() {
    this.latest = performance.now();
    this.first ??= this.latest;
    this.pieces += 1;
  }

  // Seconds until the first piece; null before it.
  get waited() {
    return this.first === undefined ? null : (this.first - this.begun) / 1000;
  }

  // Tokens per second after the first, if `tokens` have come so far.
  speed(tokens) {
    return tokens > 1 && this.latest > this.first ? ((tokens - 1) / (this.latest - this.first)) * 1000 : null;
  }
}
