"use strict";
// The arithmetic of the slider: what a step does to the values of a histogram. The same sums as lsquant.mse: between
// two transition points the squared error is S2 - 2 q s S1 + (q s)^2 S0, with sums of counts, values and squares.

/** Sums of everything below x: functions of x for count, value and square. Values are spread evenly within a bin. */
function sums(histogram) {
  return histogram.values ? sumsOfValues(histogram) : sumsOfBins(histogram);
}

function sumsOfValues({ values, counts }) {
  const totals = [[0, 0, 0]];
  values.forEach((v, i) => totals.push([0, 1, 2].map((k) => totals[i][k] + counts[i] * v ** k)));
  const upTo = (x, inclusive) => {
    let low = 0, high = values.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (values[middle] < x || (inclusive && values[middle] === x)) low = middle + 1; else high = middle;
    }
    return totals[low];
  };
  return { below: (x) => upTo(x, false), through: (x) => upTo(x, true), total: totals.at(-1) };
}

function sumsOfBins(h) {
  const width = (h.to - h.from) / h.counts.length, totals = [h.below];
  const inBin = (i, a, b) => {
    const density = h.counts[i] / width;
    return [density * (b - a), density * (b * b - a * a) / 2, density * (b ** 3 - a ** 3) / 3];
  };
  h.counts.forEach((_, i) => {
    const a = h.from + i * width, part = inBin(i, a, a + width);
    totals.push(totals[i].map((t, k) => t + part[k]));
  });
  const upTo = (x, inclusive) => {
    let found;
    if (x <= h.from) found = x < h.from && h.below[0] ? [0, 0, 0] : totals[0];
    else if (x >= h.to) found = totals.at(-1);
    else {
      const i = Math.min(Math.floor((x - h.from) / width), h.counts.length - 1), a = h.from + i * width;
      const part = inBin(i, a, x);
      found = totals[i].map((t, k) => t + part[k]);
    }
    return x > 0 || (inclusive && x === 0) ? [found[0] + h.zeros, found[1], found[2]] : found;
  };
  const end = totals.at(-1);
  return {
    below: (x) => upTo(x, false), through: (x) => upTo(x, true),
    total: [end[0] + h.zeros + h.above[0], end[1] + h.above[1], end[2] + h.above[2]],
  };
}

/** The outermost levels, in steps: [low, high]. With LSQ+'s offset the zero point follows the step. */
function levels(row, view, step) {
  if (!known(view.offset)) return [view.low, view.high];
  const zero = Math.min(Math.max(Math.round(-view.offset / step), row.q_min), row.q_max);
  return [row.q_min - zero, row.q_max - zero];
}

/** What a step does: mean squared error, SQNR in dB, shares clipped below and above, levels used. */
function judge(cumulated, step, [low, high]) {
  const [total, , signal] = cumulated.total;
  let error = 0, used = 0, before = [0, 0, 0];
  for (let q = low; q <= high; q++) {
    const upTo = q === high ? cumulated.total : cumulated.below((q + 0.5) * step);
    const [n, s1, s2] = upTo.map((t, k) => t - before[k]);
    error += s2 - 2 * q * step * s1 + (q * step) ** 2 * n;
    if (n > 0.5) used += 1;
    before = upTo;
  }
  error = error > 1e-12 * signal ? error : 0;
  return {
    error: error / total, sqnr: error ? 10 * Math.log10(signal / error) : null,
    clip_low: cumulated.below(low * step)[0] / total, clip_high: 1 - cumulated.through(high * step)[0] / total, used,
  };
}
