"""What a person with other eyes, or without a mouse, meets on a page: scripts that run in the page itself."""

# text whose contrast with what is behind it is under that of WCAG AA: 4.5, and 3 for large text
LOW_CONTRAST = r"""
(() => {
  const parse = text => {
    const [r, g, b, a = 1] = text.match(/[\d.]+/g).map(Number);
    return text.startsWith("color(") ? [r * 255, g * 255, b * 255, a] : [r, g, b, a];
  };
  const over = (top, under) => [0, 1, 2].map(i => top[i] * top[3] + under[i] * (1 - top[3])).concat(1);
  const light = color => {
    const linear = c => c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
    const [r, g, b] = color.slice(0, 3).map(c => linear(c / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = element => {
    const layers = [];
    for (let e = element; e; e = e.parentElement) {
      layers.push(parse(getComputedStyle(e).backgroundColor));
    }
    return layers.reverse().reduce((under, top) => over(top, under), [255, 255, 255, 1]);
  };
  const found = new Set();
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement, style = getComputedStyle(element);
    const box = element.getBoundingClientRect();
    if (!walker.currentNode.data.trim() || !element.checkVisibility({opacityProperty: true, visibilityProperty: true})
        || box.width < 2 || element.closest("script, style, noscript, .headerlink, [aria-hidden=true], .md-skip")) {
      continue;
    }
    const under = behind(element), ink = over(parse(style.color), under);
    const [a, b] = [light(ink), light(under)].sort((x, y) => y - x);
    const size = parseFloat(style.fontSize), large = size >= 24 || (size >= 18.66 && style.fontWeight >= 700);
    const ratio = (a + 0.05) / (b + 0.05);
    if (ratio < (large ? 3 : 4.5)) {
      const name = `${element.tagName.toLowerCase()}.${element.className}`;
      found.add(`${name}: ${ratio.toFixed(2)}, ${style.color} on ${under.slice(0, 3).map(Math.round)}`);
    }
  }
  return [...found];
})()
"""
# the levels of the headings of the text, in order
HEADINGS = """
[...document.querySelectorAll("article :is(h1, h2, h3, h4, h5, h6)")].map(e => Number(e.tagName[1]))
"""
# what is wider than the page and in no box that scrolls
WIDER_THAN_THE_PAGE = r"""
[...document.querySelectorAll("article *")].filter(e => {
  if (!e.checkVisibility() || e.getBoundingClientRect().right <= innerWidth + 1) return false;
  for (let p = e; p; p = p.parentElement) {
    if (["auto", "scroll", "hidden"].includes(getComputedStyle(p).overflowX)) return false;
  }
  return true;
}).map(e => e.outerHTML.slice(0, 100))
"""
# images, links and buttons that have no name to be read aloud
NAMELESS = r"""
[...document.querySelectorAll("img, a[href], button, input:not([type=radio], [type=checkbox])")].filter(
  e => e.checkVisibility() && !(e.alt || e.textContent.trim() || e.title || e.getAttribute("aria-label"))
).map(e => e.outerHTML.slice(0, 100))
"""
