// Answers to other questions, from the ceilings and peaks that the plan holds. The rules are those of
// autobatch.records.split and autobatch.gpus.uncertainty, and tests compare the two.
const MOST_MICRO_BATCHES = 2 ** 20;

// Divide a target into micro-batches: null where Python's `split` refuses.
function splitTarget(target, ceiling, worldSize) {
  if (target < worldSize) return null;
  const fewest = Math.ceil(target / (worldSize * ceiling));
  const steps = uniformSteps(target, ceiling, worldSize) || fewest;
  const slots = steps * worldSize;
  if (slots > MOST_MICRO_BATCHES || target < slots) return null;
  const size = Math.floor(target / slots), larger = target % slots;
  return { target, steps, worldSize, larger, size, microBatch: size + (larger ? 1 : 0), uniform: !larger };
}

function uniformSteps(target, ceiling, worldSize) {
  if (target % worldSize) return null;
  const perRank = target / worldSize;
  const fewest = Math.ceil(perRank / ceiling), smallest = Math.ceil(perRank / (2 * fewest));
  for (let size = Math.floor(perRank / fewest); size >= smallest; size -= 1) {
    if (perRank % size === 0) return perRank / size;
  }
  return null;
}

function answersOf(plan, known) {
  const peaks = new Map(known.sizes.map((size, index) => [size, known.peaks[index]]));
  const [percentiles, shares] = known.needed;

  function budget(card, headroom) {
    return Math.floor((card.capacity - card.context) * (1 - headroom));
  }

  // The peak of windows that accumulate: known where the size was predicted, else on the line between
  // the neighbours, and taken to be the larger one's at most. Below the first size the line of the first
  // two goes on. Beyond the last size it rises as from the first to the last: two neighbours' peaks are
  // rounded so coarsely that a line of theirs may fall.
  function peak(size) {
    if (peaks.has(size)) {
      const bytes = peaks.get(size);
      return { bytes, most: bytes, isKnown: true, isBounded: false };
    }
    const above = known.sizes.findIndex((each) => each > size), isBounded = above >= 0;
    const right = isBounded ? Math.max(above, 1) : known.sizes.length - 1, left = isBounded ? right - 1 : 0;
    const [n0, n1] = [known.sizes[left], known.sizes[right]];
    const [p0, p1] = [known.peaks[left], known.peaks[right]];
    const bytes = Math.max(Math.round(p0 + (p1 - p0) * (size - n0) / (n1 - n0)), 0);
    const most = isBounded ? Math.max(bytes, p0, known.peaks[above]) : bytes;
    return { bytes, most, isKnown: false, isBounded };
  }

  // At most that of the range's top where the card has less than that.
  function likelihood(reserved, card) {
    const [, most] = range(reserved), [, high] = known.between;
    const isAbove = Math.round(most + known.contexts * card.context) + known.nccl > card.capacity;
    return Math.min(shareOfRuns((card.capacity - card.context) / reserved - 1), isAbove ? high / 100 : 1);
  }

  function shareOfRuns(spare) {
    let above = shares.findIndex((share) => share > spare);
    if (above < 0) above = shares.length;
    if (above === 0 || above === shares.length) {
      return percentiles[Math.min(above, shares.length - 1)] / 100;
    }
    const [low, high] = [shares[above - 1], shares[above]];
    const between = percentiles[above] - percentiles[above - 1];
    return (percentiles[above - 1] + between * (spare - low) / (high - low)) / 100;
  }

  // What nine of ten runs reserve.
  function range(reserved) {
    return known.between.map((percentile) => reserved * (1 + shares[percentiles.indexOf(percentile)]));
  }

  // The peak of a window on a card: of the plan's own window, what its execution reserved.
  function peakOf(cardIndex, size, steps) {
    const isPlan = cardIndex === 0 && size === plan.microBatch && steps === plan.steps;
    const known = { bytes: plan.peakReserved, most: plan.peakReserved, isKnown: true, isBounded: false };
    return { ...(isPlan ? known : peak(size)), isPlan };
  }

  // What `autobatch.tune` plans for a card (its index), one of its headrooms, and a target.
  function planned(cardIndex, headroomIndex, target) {
    const card = known.cards[cardIndex];
    const ceiling = card.ceilings[headroomIndex], headroom = card.headrooms[headroomIndex];
    const limit = budget(card, headroom);
    const isOwn = cardIndex === 0 && headroom === plan.headroom && target === plan.target;
    let split, found, most = isOwn ? plan.microBatch : ceiling;
    do {  // a size below the ceiling may not fit by itself: the next smaller split is planned
      split = splitTarget(target, most, plan.worldSize);
      if (!split) return { ceiling, budget: limit, split: null };
      found = peakOf(cardIndex, split.microBatch, split.steps);
      most = split.microBatch - 1;
    } while (most > 0 && split.steps > 1 && found.isKnown && found.bytes > limit);
    return {
      ...found, ceiling, budget: limit, split, peak: found.bytes,
      // a window of one micro-batch is another one, in which no gradients wait
      exact: found.isPlan || (found.isKnown && split.steps > 1),
      // where no window can accumulate, the search is for windows of one micro-batch
      isLeast: target === plan.worldSize,
      likelihood: likelihood(found.most, card),
    };
  }

  function byHand(cardIndex, headroomIndex, size, steps) {
    const card = known.cards[cardIndex], found = peakOf(cardIndex, size, steps);
    const limit = budget(card, card.headrooms[headroomIndex]);
    return {
      ...found, budget: limit, fits: found.most <= limit, batch: size * steps * plan.worldSize,
      likelihood: likelihood(found.most, card),
    };
  }

  return { known, budget, peak, likelihood, range, planned, byHand, splitTarget };
}
