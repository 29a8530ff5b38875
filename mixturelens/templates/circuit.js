"use strict";
(() => {
  const STEP = { ArrowUp: [0, -1], ArrowDown: [0, 1], ArrowLeft: [-1, 0], ArrowRight: [1, 0] };

  const make = (tag, text, name) => {
    const made = document.createElement(tag);
    if (text !== undefined) made.textContent = text;
    if (name) made.className = name;
    return made;
  };

  const start = (root) => {
    if (root.dataset.started) return;
    root.dataset.started = "yes";
    const { words, sides, features } = JSON.parse(root.querySelector("script[type='application/json']").textContent);
    const svg = root.querySelector("svg");
    const [slider, shown, tip, panel] = ["input", "output", ".tip", ".panel"].map((name) => root.querySelector(name));
    const ranked = [...svg.querySelectorAll("[data-rank]")];
    const nodes = [...svg.querySelectorAll(".node")];
    const edges = [...svg.querySelectorAll(".edge[data-from]")];
    const sideOf = (part) => part.closest("[data-side]");
    const visible = (part) => part.getAttribute("display") !== "none";

    /* a drawing without a script says by <title> what this says by its own label */
    for (const edge of edges) {
      const title = edge.querySelector("title");
      edge.said = title.textContent;
      title.remove();
    }

    const resize = () => {
      shown.value = slider.value;
      for (const part of ranked) {
        if (Number(part.dataset.rank) <= Number(slider.value)) part.removeAttribute("display");
        else part.setAttribute("display", "none");
      }
      const within = nodes.filter(visible);
      if (!within.some((node) => node.getAttribute("tabindex") === "0")) focusable(within[0]);
    };

    /* one node at a time is reached by Tab, the others from there by arrow keys */
    const focusable = (node) => {
      for (const each of nodes) each.setAttribute("tabindex", each === node ? "0" : "-1");
    };

    const middle = (node) => {
      const box = node.querySelector(".body").getBoundingClientRect();
      return [box.x + box.width / 2, box.y + box.height / 2];
    };

    const walk = (event, node) => {
      if (event.key === "Enter" || event.key === " ") {
        event.preventDefault();
        return pick(node);
      }
      if (event.key === "Escape") return unpick();
      const step = STEP[event.key];
      if (!step) return undefined;
      event.preventDefault();
      const [x, y] = middle(node);
      let best = null;
      let least = Infinity;
      for (const other of nodes) {
        if (other === node || !visible(other)) continue;
        const [u, v] = middle(other);
        const along = (u - x) * step[0] + (v - y) * step[1];
        const aside = Math.abs((u - x) * step[1]) + Math.abs((v - y) * step[0]);
        if (along > 2 && along + 3 * aside < least) [best, least] = [other, along + 3 * aside];
      }
      if (best) {
        focusable(best);
        best.focus();
      }
      return undefined;
    };

    /* what hangs together with a node or an edge stays, the rest fades */
    const near = (part) => {
      svg.classList.toggle("near", Boolean(part));
      if (!part) return;
      const side = sideOf(part);
      const ends = part.dataset.node ? [part.dataset.node] : [part.dataset.from, part.dataset.to];
      const linked = new Set(ends);
      for (const other of side.querySelectorAll("[data-from]")) {
        const touches = part.dataset.node ? ends.includes(other.dataset.from) || ends.includes(other.dataset.to) : other === part;
        other.classList.toggle("faded", !touches);
        if (touches && visible(other)) [other.dataset.from, other.dataset.to].forEach((end) => linked.add(end));
      }
      for (const node of side.querySelectorAll(".node")) node.classList.toggle("faded", !linked.has(node.dataset.node));
      for (const each of svg.querySelectorAll("[data-side]")) {
        if (each !== side) for (const other of each.querySelectorAll(".faded")) other.classList.remove("faded");
      }
    };

    const tell = (event, text) => {
      tip.hidden = false;
      tip.textContent = text;
      const box = root.getBoundingClientRect();
      const x = event.clientX - box.x + 14;
      tip.style.left = `${Math.max(0, Math.min(x, box.width - tip.offsetWidth - 4))}px`;
      tip.style.top = `${event.clientY - box.y + 16}px`;
    };
    const hush = () => {
      tip.hidden = true;
      near(null);
    };

    const numbers = (name) => {
      const table = make("table");
      const head = table.createTHead().insertRow();
      head.insertCell();
      for (const text of ["through it (slopes)", "patched alone", "needed"]) head.append(make("th", text));
      for (const side of Object.values(sides)) {
        const row = table.insertRow();
        row.append(make("th", side.name));
        for (const number of side.nodes[name] || ["–", "–", "–"]) row.insertCell().textContent = number;
      }
      return table;
    };

    const attention = (name, at) => {
      const box = make("div", undefined, "two");
      for (const side of Object.values(sides)) {
        const look = side.looks[`${name}@${at}`];
        if (!look) continue;
        const part = make("div");
        part.append(make("p", `${side.name}: where ${name} looks from ${words[at]}`, "head"));
        const table = make("table");
        const row = table.createTHead().insertRow();
        for (const text of ["token", side.clean, side.corrupt]) row.append(make("th", text));
        const tokens = [...new Set(look.flatMap((each) => Object.keys(each)))].map(Number).sort((a, b) => a - b);
        for (const token of tokens) {
          const line = table.insertRow();
          line.append(make("th", words[token]));
          look.forEach((each, i) => {
            const cell = line.insertCell();
            const bar = make("span", "", i ? "share corrupt" : "share");
            bar.style.width = `${Math.round(90 * (each[token] || 0))}px`;
            cell.append(bar, ` ${each[token] === undefined ? "<0.01" : each[token].toFixed(2)}`);
          });
        }
        part.append(table);
        box.append(part);
      }
      return box.childElementCount ? box : null;
    };

    const lines = (title, list) => {
      const part = make("div");
      part.append(make("p", title, "head"));
      const items = make("ul");
      for (const edge of list) items.append(make("li", edge.said.replaceAll("\n", "; ")));
      part.append(list.length ? items : make("p", "None of those shown."));
      return part;
    };

    const unpick = () => {
      panel.hidden = true;
      for (const node of nodes) node.classList.remove("picked");
    };

    const pick = (node) => {
      unpick();
      focusable(node);
      node.classList.add("picked");
      const [name, position] = node.dataset.node.split("@");
      const at = Number(position);
      panel.hidden = false;
      panel.replaceChildren(make("p", `${name} at ${words[at]} (position ${at})`, "title"), numbers(name));
      const looks = attention(name, at);
      if (looks) panel.append(looks);
      else if (/\.h\d+$/.test(name)) panel.append(make("p", "The record does not hold where it looks from here."));
      const found = features.filter((each) => (each.whole ? name === each.node : name.startsWith(each.node)) && (each.at === null || each.at === at));
      if (found.length) {
        panel.append(make("p", "Features behind it", "head"));
        const list = make("ul");
        for (const each of found) {
          const item = make("li");
          const link = make(each.anchor ? "a" : "span", each.title);
          if (each.anchor) link.href = `#${each.anchor}`;
          item.append(link, `: ${each.why}`);
          list.append(item);
        }
        panel.append(list);
      }
      /* a head's keys and values come in at other tokens than that at which it writes */
      const here = node.dataset.node;
      const moved = [...sideOf(node).querySelectorAll(".moves")].filter(visible);
      const reads = new Set([here, ...moved.filter((each) => each.dataset.to === here).map((each) => each.dataset.from)]);
      const writes = new Set([here, ...moved.filter((each) => each.dataset.from === here).map((each) => each.dataset.to)]);
      const side = edges.filter((edge) => visible(edge) && sideOf(edge) === sideOf(node));
      const both = make("div", undefined, "two");
      both.append(lines("It reads", side.filter((edge) => reads.has(edge.dataset.to))));
      both.append(lines("It is read by", side.filter((edge) => writes.has(edge.dataset.from))));
      panel.append(both);
    };

    slider.addEventListener("input", resize);
    for (const node of nodes) {
      node.addEventListener("click", () => pick(node));
      node.addEventListener("keydown", (event) => walk(event, node));
      node.addEventListener("focus", () => near(node));
      node.addEventListener("blur", () => near(null));
      node.addEventListener("pointermove", (event) => { near(node); tell(event, `${node.getAttribute("aria-label")}\nClick for what is behind it.`); });
      node.addEventListener("pointerleave", hush);
    }
    for (const edge of edges) {
      edge.addEventListener("pointermove", (event) => { near(edge); tell(event, edge.said); });
      edge.addEventListener("pointerleave", hush);
    }
    resize();
  };
  document.querySelectorAll(".circuit").forEach(start);
})();
