// Memory by module at an instant, as nested boxes whose widths are bytes.
function useIcicle(history, data) {
  const tree = byId("tree"), crumbs = byId("crumbs"), title = byId("icicle-title");
  const categories = [...(data.lives ? data.lives.categories : Object.keys(CATEGORY_CLASSES)), "rounding"];
  const ROW = 34, DEEPEST = 8;
  let root = null, inside = null, isWhole = true, event = history.peak;

  function grown({ entries, rounding }) {
    const make = (name, path) => ({ name, path, size: 0, parts: new Map(), children: new Map(), parent: null });
    const whole = make("everything", "");
    for (const [module, category, op, size] of entries) {
      let node = whole;
      const parts = module ? module.split(".") : ["outside of modules"];
      const visited = [node];
      const step = (key, name, path) => {
        if (!node.children.has(key)) {
          const child = make(name, path);
          child.parent = node;
          node.children.set(key, child);
        }
        node = node.children.get(key);
        visited.push(node);
      };
      parts.forEach((part, index) => step(part, part, module ? parts.slice(0, index + 1).join(".") : "\u0000"));
      // below a module, what its own operators hold
      step("\u0000" + op, op || "not known", node.path + "\u0000" + op);
      node.isOp = true;
      for (const each of visited) {
        each.size += size;
        each.parts.set(category, (each.parts.get(category) || 0) + size);
      }
    }
    if (rounding) {
      const name = "rounding by the allocator", node = { ...make(name, name), parent: whole };
      whole.children.set(name, node);
      for (const each of [whole, node]) {
        each.size += rounding;
        each.parts.set(categories.lastIndexOf("rounding"), rounding);
      }
    }
    return whole;
  }

  const label = (node) => !node.parent ? "Everything" : node.isOp ? node.name + " in " + label(node.parent)
    : node.path === "\u0000" ? "outside of modules" : node.path;

  function strip(node) {
    let at = 0;
    const stops = [...node.parts].sort((one, other) => one[0] - other[0]).map(([category, size]) => {
      const colour = "var(--" + (CATEGORY_CLASSES[categories[category]] || "c-other") + ")";
      const from = at;
      at += 100 * size / node.size;
      return colour + " " + from.toFixed(2) + "% " + at.toFixed(2) + "%";
    });
    return "linear-gradient(90deg," + stops.join(",") + ")";
  }

  function describe(node) {
    const parts = [...node.parts].sort((one, other) => other[1] - one[1]).slice(0, 4)
      .map(([category, size]) => categories[category] + " " + formatBytes(size));
    return label(node) + ": " + formatBytes(node.size) + ", " + percent(node.size / Math.max(root.size, 1)) + " (" + parts.join(", ") + ")";
  }

  function say(node) {
    const small = isWhole ? "" : "Blocks below " + formatBytes(data.lives.least) + " are not drawn here.";
    crumbs.textContent = node.size ? describe(node) + (small && ". " + small) : small || "Nothing is allocated.";
  }

  function draw(focusOn) {
    tree.replaceChildren();
    const boxes = [];
    let deepest = 0;
    const scale = 100 / Math.max(inside.size, 1);
    const place = (node, left, depth) => {
      const width = node.size * scale;
      if (width < 0.15 || depth > DEEPEST) return;
      deepest = Math.max(deepest, depth);
      const room = width * tree.clientWidth / 100;
      const box = element("button", node.isOp ? "op" : "", room < 26 ? "" : node.parent ? node.name : "Everything");
      box.type = "button";
      box.setAttribute("role", "treeitem");
      box.setAttribute("aria-level", String(depth + 1));
      box.setAttribute("aria-label", describe(node));
      if (node.children.size) box.setAttribute("aria-expanded", "true");
      box.title = describe(node);
      box.style.cssText = "left:" + left + "%;width:" + width + "%;top:" + depth * ROW + "px";
      const most = [...node.parts].sort((one, other) => other[1] - one[1])[0][0];
      box.style.setProperty("--shade", "var(--" + (CATEGORY_CLASSES[categories[most]] || "c-other") + ")");
      const band = element("i");
      band.style.background = strip(node);
      box.append(band);
      box.tabIndex = -1;
      boxes.push({ box, node });
      tree.append(box);
      box.addEventListener("pointerenter", () => say(node));
      box.addEventListener("focus", () => say(node));
      box.addEventListener("click", () => open(node));
      box.addEventListener("keydown", (key) => move(key, node, boxes));
      let at = left;
      for (const child of [...node.children.values()].sort((one, other) => other.size - one.size)) {
        place(child, at, depth + 1);
        at += child.size * scale;
      }
    };
    if (inside.size) place(inside, 0, 0);
    tree.style.height = (deepest + 1) * ROW + "px";
    if (boxes.length) boxes[0].box.tabIndex = 0;
    if (focusOn && boxes.length) (boxes.find(({ node }) => node === focusOn) || boxes[0]).box.focus();
    say(inside);
  }

  function open(node) {
    inside = node === inside && node.parent ? node.parent : node;
    draw(node);
  }

  function move(key, node, boxes) {
    const siblings = node.parent && node !== inside ? [...node.parent.children.values()].sort((one, other) => other.size - one.size) : [node];
    const at = siblings.indexOf(node);
    const inner = [...node.children.values()].sort((one, other) => other.size - one.size)[0];
    const next = {
      ArrowRight: siblings[at + 1], ArrowLeft: siblings[at - 1], ArrowDown: inner,
      ArrowUp: node === inside ? null : node.parent, Home: inside,
    }[key.key];
    if (key.key === "Escape" && inside.parent) {
      key.preventDefault();
      const left = inside;
      inside = inside.parent;
      draw(left);
    }
    const found = next && boxes.find((each) => each.node === next);
    if (!found) return;
    key.preventDefault();
    for (const { box } of boxes) box.tabIndex = -1;
    found.box.tabIndex = 0;
    found.box.focus();
  }

  function show(at) {
    event = at;
    const found = history.modulesAt(event);
    isWhole = found.isWhole;
    const path = inside ? label(inside) : null;
    root = grown(found);
    inside = root;
    const seek = (node) => { if (label(node) === path) inside = node; node.children.forEach(seek); };
    if (path) seek(root);
    title.textContent = event === history.peak ? "By module at the peak" : "By module at event " + formatCount(event);
    draw();
  }

  show(history.peak);
  return { show };
}
